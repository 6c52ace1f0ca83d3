"""One step's work through the model: flat tokens in, hidden states and the logits that are drawn from out.

`Runner` is the model's own forward pass, all streams' tokens at once: on any machine. `RowByRow` feeds every token
alone. The same token behind the same prefix then always meets products of the same shapes, so its numbers are the same
to the last bit, whoever else is in the batch, however prompts are cut into chunks, whether a prefix was found in the
cache or computed, and whether a token came as a draft. Then a batch is no faster than its streams one after the other.
native.py has another way to both.

Shapes: T tokens of the step, D model, R rows drawn from, V vocabulary, L layers with experts, K chosen.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from shoal.engine.attend import Paged, Span
from shoal.engine.cache import Cache
from shoal.engine.scheduler import Work
from shoal.model.transformer import Transformer


class Runner:
    most_steps = 1  # that can be taken together

    def __init__(self, model: Transformer, cache: Cache):
        self.model, self.cache = model, cache

    def run(self, work: Sequence[Work], chosen: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm [T, D], in the order of `work`, and logits [R, V] (fp32).

        What routers chose is appended to `chosen`, for all rows in order: int16 [n, L, K].
        """
        hidden_TD = self.body([t for w in work for t in w.tokens], spans_of(work), chosen)
        rows = drawn_rows(work)
        return hidden_TD, self.head(hidden_TD if len(rows) == len(hidden_TD) else hidden_TD[rows])

    def body(self, tokens: Sequence[int], spans: Sequence[Span], chosen: list[Tensor] | None = None) -> Tensor:
        """Hidden states after the final norm [T, D]; the cache's rows are written. The shortest spans come first."""
        embedded_TD = self.model.embed(self._tensor(tokens))
        hidden_TD, routes = self.model.body(embedded_TD, self._positions(spans), Paged(self.cache, spans))
        if chosen is not None:
            experts = [r.experts_TK.to("cpu", torch.int16) for r in routes]
            chosen.append(torch.stack(experts, 1) if experts else torch.empty(len(tokens), 0, 0, dtype=torch.int16))
        return hidden_TD

    def module(
        self, hidden_TD: Tensor, following: Sequence[int], spans: Sequence[Span], drawn: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """The first multi-token module on the model's hidden states and the tokens that follow.

        Its own hidden state [R, D] and logits [R, V] (fp32) at the end of each span that is `drawn` from.
        """
        last = ends(spans, drawn)
        hidden_RD = self._module(hidden_TD, following, spans)[last]
        return hidden_RD, self.head(hidden_RD)

    def _module(self, hidden_TD: Tensor, following: Sequence[int], spans: Sequence[Span]) -> Tensor:
        embedded_TD = self.model.embed(self._tensor(following))
        return self.model.mtp[0](hidden_TD, embedded_TD, self._positions(spans), Paged(self.cache, spans))[0]

    def head(self, hidden_RD: Tensor) -> Tensor:
        """Logits [R, V] in fp32, the caller's to change."""
        return self.model.head(hidden_RD).float()

    def _positions(self, spans: Sequence[Span]) -> Tensor:
        return self._tensor([i for span in spans for i in range(span.start, span.end)])

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.cache.device)


class RowByRow(Runner):
    def body(self, tokens: Sequence[int], spans: Sequence[Span], chosen: list[Tensor] | None = None) -> Tensor:
        alone = [Span(i, 1, span.pages) for span in spans for i in range(span.start, span.end)]
        one = super().body
        return torch.cat([one([t], [span], chosen) for t, span in zip(tokens, alone, strict=True)])

    def head(self, hidden_RD: Tensor) -> Tensor:
        # cloned: a product may round otherwise where its rows begin at another alignment
        rows = [super(RowByRow, self).head(row.clone()) for row in hidden_RD.split(1)]
        return torch.cat(rows) if rows else super().head(hidden_RD)


def spans_of(work: Sequence[Work]) -> list[Span]:
    return [Span(w.start, len(w.tokens), w.stream.pages) for w in work]


def ends(spans: Sequence[Span], drawn: Sequence[bool]) -> list[int]:
    """The last row of each span that is drawn from."""
    after = accumulate(span.n for span in spans)
    return [end - 1 for end, draws in zip(after, drawn, strict=True) if draws]


def drawn_rows(work: Sequence[Work]) -> list[int]:
    """The last `draws` rows of each."""
    rows, end = [], 0
    for w in work:
        end += len(w.tokens)
        rows += range(end - w.draws, end)
    return rows
