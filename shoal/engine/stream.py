"""One request on its way: its tokens so far, how far the cache holds them, and what guides the next draw.

    tokens     t_0 … t_p-1 │ t_p …        │ t
               prompt      │ completion   │ the last one, drawn but not yet fed to the model
    computed   ────────────────────────── positions whose rows are in the cache: all but the last while decoding
    drafts                                  d_1 d_2 …   guesses behind the last token, fed with it to be verified

The drafting module has rows of its own. They may lag behind: `pending` holds the hidden states they need.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.engine.pages import UNIT, Key, chained, root
from shoal.engine.request import Finish, Request, Token, Usage


class Draft(NamedTuple):
    """A guessed token; `q_V` is the distribution it was drawn from, None where it is simply the likeliest."""

    token: int
    q_V: Tensor | None = None


class Stream:
    def __init__(self, request: Request, arrival: int, seed: int):
        """`seed` is for the draws: the request's own, or one the engine made up."""
        self.request, self.seed = request, seed
        self.order = (request.priority, arrival)
        self.tokens = list(request.tokens)
        self.n_prompt = len(self.tokens)
        self.limit = self.n_prompt + request.max_tokens
        self.finish: Finish | None = None
        self.forced: int | None = None
        self.mask: Tensor | None = None
        self.hidden: tuple[float, ...] = ()
        self.echoed: list[Token] = []
        self.cached, self.told, self.drafted, self.accepted = None, 0, 0, 0
        self._routes: list[Tensor] = []
        self._routed = 0  # tokens whose routes are known
        self._keys: list[Key] = []
        self.pages: list[int] = []
        self.hold([], 0)

    def hold(self, pages: list[int], computed: int) -> None:
        """Own these pages, of which `computed` tokens' rows are filled (shared, and kept under their keys already)."""
        self.pages, self.computed, self.kept, self.stored = pages, computed, computed // UNIT, 0
        self.module_computed, self.pending, self.drafts = computed, [], []
        self.sum_D = None
        self.first = bool(pages) and self.cached is None
        if self.first:
            self.cached = computed

    def load(self) -> None:
        """The next unit's rows came from the disk, all of them."""
        assert self.kept * UNIT == self.computed and not self.pending, (self.kept, self.computed)
        if self.first and self.cached == self.computed:
            self.cached = self.computed + UNIT
        self.computed = self.module_computed = self.computed + UNIT
        self.kept += 1

    first: bool  # whether it has these pages since it was first admitted
    stored: int  # of its pages, offered to the disk
    pending: list[Tensor]  # [n, D] each: final hidden states of positions module_computed to computed
    drafts: list[Draft]
    echoed: list[Token]  # the prompt as far as it was read, where it is to be echoed
    sum_D: Tensor | None  # of final hidden states, where the request is to be embedded
    cached: int | None  # of the prompt, found without computing it when it was first admitted
    told: int  # tokens that the sink was given

    @property
    def decoding(self) -> bool:
        return self.computed == len(self.tokens) - 1

    @property
    def steered(self) -> bool:
        """Whether the guide has a say in the next token."""
        return self.forced is not None or self.mask is not None

    @property
    def plain(self) -> bool:
        """Whether it is decoding, and nobody but its seed and temperature has a say in the next draw."""
        return self.decoding and not self.drafts and not self.steered and self.request.sampling.plain

    @property
    def usage(self) -> Usage:
        """A prompt that was never admitted has cost nothing, nor have tokens that were drawn and never told."""
        read = 0 if self.cached is None else self.n_prompt
        return Usage(read, self.cached or 0, self.told, self.drafted, self.accepted)

    def key(self, unit: int) -> Key:
        while len(self._keys) <= unit:
            before = self._keys[-1] if self._keys else root(self.request.salt)
            start = len(self._keys) * UNIT
            self._keys.append(chained(before, self.tokens[start : start + UNIT]))
        return self._keys[unit]

    @property
    def findable(self) -> int:
        """Units that may be found instead of computed: not that of the last token, which is drawn from, and none where
        each token's hidden state or routes are wanted."""
        r = self.request
        return 0 if r.embed or r.echo or r.routes else (len(self.tokens) - 1) // UNIT

    def keys(self) -> Iterator[Key]:
        """Of the units that may be found."""
        return (self.key(unit) for unit in range(self.findable))

    def pool(self, hidden_TD: Tensor) -> None:
        """Take the next positions into the mean; with the last one, this is the end."""
        sum_D = hidden_TD.float().sum(0)
        self.sum_D = sum_D if self.sum_D is None else self.sum_D + sum_D
        if self.computed == self.n_prompt:
            self.finish, self.hidden = "stop", tuple((self.sum_D / self.n_prompt).tolist())

    def follow_routes(self, start: int, routes_TLK: Tensor) -> None:
        """Keep those of the positions from `start` on that are fed for the first time, and stand."""
        new = routes_TLK[max(self._routed - start, 0) : self.computed - start]
        self._routes.append(new.clone())
        self._routed += len(new)

    @property
    def routes(self) -> Tensor | None:
        return torch.cat(self._routes) if self._routes else None

    def steer(self) -> None:
        """Ask the guide about the next token."""
        guide = self.request.guide
        if guide is not None:
            self.forced = guide.forced()
            self.mask = guide.mask() if self.forced is None else None
            assert self.mask is None or bool(self.mask.any()), "the guide allows no token"

    def accept(self, *tokens: int) -> Finish | None:
        """One more token, or several where there is no guide and all but the last are known to end nothing; whether it
        is the last, and why."""
        guide, token = self.request.guide, tokens[-1]
        assert guide is None or len(tokens) == 1
        self.tokens += tokens
        goes_on = guide is None or guide.accept(token)
        if token in self.request.stop_tokens or not goes_on:
            self.finish = "stop"
        elif len(self.tokens) == self.limit:
            self.finish = "length"
        else:
            self.steer()
        return self.finish
