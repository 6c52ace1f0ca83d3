"""From logits to tokens: every row of a batch by its own request's rules.

    raw logits → penalties, bias, the guide's mask → ÷ temperature → top-k, top-p, min-p → p → one draw

A draw takes one uniform number, hashed from (seed, position), and finds it on p's cumulative sum. So a seeded request
draws the same whatever else is in the batch, and after a preemption.

A row may carry the draft that was fed behind it. Its token is drawn as always, and where it equals the draft the next
row stands too; that alone keeps the distribution (p decides, the draft only guesses). A draft that was itself drawn,
from q, is right more often by the rule of Leviathan et al. (arXiv 2211.17192): take it with probability min(1, p/q),
else draw from max(p - q, 0). Seeded requests keep to the first way, with the likeliest token as draft: their tokens
must not depend on whether there were drafts.

Draws happen on the CPU in fp64, the same on every device. Where the machine has native kernels, those that only a seed
and a temperature decide are theirs (ops/native/draws.c: exponentials in fp32), with equal tokens but for roundings at a
boundary; that function alone draws them, whether a step is taken by itself or with others.

Shapes: R rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.data.draws import MASK, uniform
from shoal.engine.request import Sampling, Token
from shoal.engine.stream import Draft, Stream
from shoal.errors import RequestError
from shoal.ops import cpu

MIN_TEMPERATURE = 1e-3  # above 0, which is greedy; less would draw nothing but the likeliest either
MOST_BIAS = 1e6  # stays finite in fp32 logits
NUCLEUS = 64  # likeliest tokens looked at first for top-k and top-p; more only where they don't suffice
ECHO_ROWS = 32  # of a prompt to echo, whose logits stand in memory at once: a row may be half a MiB
DRAW, DRAFT, ACCEPT, INSTEAD = range(4)  # what a uniform number is for


class Row(NamedTuple):
    """What one row of logits is drawn by. `ahead` are drafts between the stream's last token and this row."""

    sampling: Sampling
    seed: int
    tokens: Sequence[int]
    n_prompt: int
    ahead: tuple[int, ...] = ()
    forced: int | None = None
    mask: Tensor | None = None
    draft: Draft | None = None

    @property
    def position(self) -> int:
        return len(self.tokens) + len(self.ahead)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether nobody but its seed and temperature has a say in the draw, and no more is wanted than that token."""
        guessed = self.draft is not None and self.draft.q_V is not None
        return self.sampling.plain and self.mask is None and self.forced is None and not guessed

    def uniform(self, purpose: int) -> float:
        return uniform(self.seed, self.position, purpose)


def rows(stream: Stream, draws: int) -> list[Row]:
    """For a stream's last token and the drafts behind it. The guide's word is for the first; no draft goes with it."""
    s, drafts, ahead = stream, [*stream.drafts, None], tuple(draft.token for draft in stream.drafts)
    first = Row(s.request.sampling, s.seed, s.tokens, s.n_prompt, (), s.forced, s.mask, drafts[0])
    return [first, *(first._replace(ahead=ahead[:i], draft=drafts[i]) for i in range(1, draws))][:draws]


def draft_row(stream: Stream) -> Row:
    """For the token behind a stream's drafts."""
    ahead = tuple(draft.token for draft in stream.drafts)
    return Row(stream.request.sampling, stream.seed, stream.tokens, stream.n_prompt, ahead)


def choose(logits_RV: Tensor, rows: Sequence[Row]) -> list[Token]:
    """One token a row. `logits_RV` (fp32) are the model's own, and stay as they are."""
    if all(row.plain and row.greedy and row.sampling.logprobs is None for row in rows):
        return [Token(t) for t in logits_RV.argmax(-1).tolist()]
    raw_RV = logits_RV.cpu()
    takes = cpu.takes_draws(raw_RV)
    native = [takes and row.plain for row in rows]
    if len({*native}) == 1:
        return (_drawn if native[0] else _chosen)(raw_RV, rows)
    tokens = {}
    for way, mine in ((_drawn, native), (_chosen, [not n for n in native])):
        tokens.update(zip(compress(range(len(rows)), mine), way(raw_RV[mine], [*compress(rows, mine)])))
    return [tokens[r] for r in range(len(rows))]


def _drawn(raw_RV: Tensor, rows: Sequence[Row]) -> list[Token]:
    """Of plain rows, by the native kernel: as where a program takes several steps together (native.Native.steps)."""
    how = [(row.sampling.temperature, row.seed & MASK, row.position) for row in rows]
    drawn = cpu.draw(raw_RV, *zip(*how))
    return [Token(t, None if row.sampling.logprobs is None else p) for row, t, p in zip(rows, *drawn, strict=True)]


def _chosen(raw_RV: Tensor, rows: Sequence[Row]) -> list[Token]:
    edited_RV = edited(raw_RV, rows)
    tokens = edited_RV.argmax(-1)
    drawn = [r for r, row in enumerate(rows) if not row.greedy and row.forced is None]
    if drawn:
        p_RV = shaped(edited_RV[drawn], [rows[r].sampling for r in drawn])
        tokens[drawn] = _settled(p_RV, [rows[r] for r in drawn])
    chosen = [t if row.forced is None else row.forced for t, row in zip(tokens.tolist(), rows, strict=True)]
    return with_logprobs(raw_RV, rows, chosen)


def propose(logits_RV: Tensor, rows: Sequence[Row]) -> list[Draft]:
    """A guess at each row's token by the drafting module's logits: drawn like the token itself, or the likeliest."""
    edited_RV = edited(logits_RV, rows)
    drafts = [Draft(t) for t in edited_RV.argmax(-1).tolist()]
    drawn = [r for r, row in enumerate(rows) if not row.greedy and row.sampling.seed is None]
    if drawn:
        q_RV = shaped(edited_RV[drawn].cpu(), [rows[r].sampling for r in drawn])
        tokens_R = draw(q_RV, [rows[r].uniform(DRAFT) for r in drawn])
        for r, token, q_V in zip(drawn, tokens_R.tolist(), q_RV, strict=True):
            drafts[r] = Draft(token, q_V)
    return drafts


def _settled(p_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    tokens_R = draw(p_RV, [row.uniform(DRAW) for row in rows])
    drafted = [(r, row.draft) for r, row in enumerate(rows) if row.draft is not None and row.draft.q_V is not None]
    if drafted:
        index, drafts = [r for r, _ in drafted], [draft.token for _, draft in drafted]
        q_RV = torch.stack([draft.q_V for _, draft in drafted if draft.q_V is not None])
        u, v = ([rows[r].uniform(purpose) for r in index] for purpose in (ACCEPT, INSTEAD))
        tokens_R[index] = accept_or_redraw(p_RV[index], q_RV, torch.tensor(drafts), u, v)
    return tokens_R


def accept_or_redraw(
    p_RV: Tensor, q_RV: Tensor, draft_R: Tensor, accept: Sequence[float], instead: Sequence[float]
) -> Tensor:
    """Tokens [R] distributed as p, where drafts are distributed as q; equal to the draft as often as that allows."""
    at_draft = draft_R[:, None]
    ratio_R = (p_RV.gather(1, at_draft) / q_RV.gather(1, at_draft))[:, 0]
    rest_RV = (p_RV - q_RV).clamp_min(0)
    rest_RV = torch.where(rest_RV.sum(-1, keepdim=True) > 0, rest_RV, p_RV)  # p = q but for rounding
    accepted_R = torch.tensor(accept, dtype=torch.float64) < ratio_R
    return torch.where(accepted_R, draft_R, draw(rest_RV, instead))


def draw(p_RV: Tensor, u: Sequence[float]) -> Tensor:
    """The token at which each row's cumulative sum passes u (0 ≤ u < 1) of its total: int64 [R]."""
    sums_RV = p_RV.double().cumsum(-1)
    reached_R1 = sums_RV[:, -1:] * torch.tensor(u, dtype=torch.float64)[:, None]
    tokens_R = torch.searchsorted(sums_RV, reached_R1, right=True)[:, 0]
    assert bool((tokens_R < p_RV.shape[1]).all()), "a draw from what is no distribution"
    return tokens_R


def shaped(logits_RV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The distribution that is drawn from, fp64, each row's sum 1."""
    temperature_R = torch.tensor([s.temperature for s in samplings], dtype=torch.float64)
    below_RV = logits_RV.double() - logits_RV.amax(-1, keepdim=True)  # no temperature makes these overflow upwards
    p_RV = (below_RV / temperature_R[:, None]).softmax(-1)
    cut = [r for r, s in enumerate(samplings) if s.top_k or s.top_p < 1]
    if cut:
        k_R = torch.tensor([samplings[r].top_k or p_RV.shape[1] for r in cut])
        top_p_R = torch.tensor([samplings[r].top_p for r in cut], dtype=torch.float64)
        p_RV[cut] = nucleus(p_RV[cut], k_R, top_p_R, NUCLEUS)
    floors = [r for r, s in enumerate(samplings) if s.min_p > 0]
    if floors:
        p_FV, floor_F = p_RV[floors], torch.tensor([samplings[r].min_p for r in floors], dtype=torch.float64)
        p_RV[floors] = p_FV.where(p_FV >= floor_F[:, None] * p_FV.amax(-1, keepdim=True), 0.0)
    return p_RV / p_RV.sum(-1, keepdim=True)


def nucleus(p_RV: Tensor, k_R: Tensor, top_p_R: Tensor, n: int) -> Tensor:
    """p of the k likeliest tokens, and of those the fewest that hold `top_p` of their sum; 0 for all others.

    Looks at the `n` likeliest; rows that need more are done again with more.
    """
    V = p_RV.shape[1]
    best_RN, index_RN = p_RV.topk(min(n, V)) if n < V else p_RV.sort(descending=True, stable=True)
    among_RN = torch.arange(best_RN.shape[1]) < k_R[:, None]
    best_RN = best_RN * among_RN
    total_R1 = torch.where(k_R < V, best_RN.sum(-1), p_RV.sum(-1))[:, None]
    sums_RN = best_RN.cumsum(-1)
    kept_RN = best_RN * (sums_RN - best_RN < top_p_R[:, None] * total_R1)
    p_cut_RV = torch.zeros_like(p_RV).scatter_(1, index_RN, kept_RN)
    if n < V:
        short_R = torch.where(k_R < V, k_R > n, sums_RN[:, -1] < top_p_R * total_R1[:, 0])
        if short_R.any():
            p_cut_RV[short_R] = nucleus(p_RV[short_R], k_R[short_R], top_p_R[short_R], 16 * n)
    return p_cut_RV


def edited(logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """With penalties, bias and mask; a copy where there are any."""
    changed = [r for r, row in enumerate(rows) if _edited(row)]
    if not changed:
        return logits_RV
    logits_RV = logits_RV.clone()
    for r in changed:
        _edit(logits_RV[r], rows[r])
    return logits_RV


def _edited(row: Row) -> bool:
    return row.sampling.edits or row.mask is not None


def _edit(logits_V: Tensor, row: Row) -> None:
    """Repetition counts prompt and completion (arXiv 1909.05858); presence and frequency, as OpenAI's, the latter."""
    s, device = row.sampling, logits_V.device
    if s.repetition_penalty != 1:
        seen = torch.tensor([*row.tokens, *row.ahead], device=device).unique()
        logits = logits_V[seen]
        logits_V[seen] = torch.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        completion = torch.tensor([*row.tokens[row.n_prompt :], *row.ahead], dtype=torch.int64, device=device)
        seen, counts = completion.unique(return_counts=True)
        logits_V[seen] -= s.presence_penalty + s.frequency_penalty * counts
    if s.logit_bias:
        index = torch.tensor(list(s.logit_bias), device=device)
        logits_V[index] += torch.tensor(list(s.logit_bias.values()), dtype=logits_V.dtype, device=device)
    if row.mask is not None:
        logits_V.masked_fill_(~row.mask.to(device), -torch.inf)


def with_logprobs(raw_RV: Tensor, rows: Sequence[Row], tokens: Sequence[int]) -> list[Token]:
    """Tokens with the log-probabilities that were asked for."""
    out, asked = [Token(t) for t in tokens], [(r, row.sampling.logprobs) for r, row in enumerate(rows)]
    asked = [(r, n) for r, n in asked if n is not None]
    if asked:
        index = [r for r, _ in asked]
        log_p_AV = raw_RV[index].log_softmax(-1)
        own_A = log_p_AV.gather(1, torch.tensor([[tokens[r]] for r in index]))[:, 0].tolist()
        for a, (r, n) in enumerate(asked):
            best, best_tokens = log_p_AV[a].topk(n)  # alone: which of equals come first depends on n
            out[r] = Token(tokens[r], own_A[a], tuple(zip(best_tokens.tolist(), best.tolist())))
    return out


def echo(stream: Stream, start: int, hidden_TD: Tensor, head: Callable[[Tensor], Tensor]) -> None:
    """Log-probabilities of the prompt's tokens that the rows from position `start` on foretell."""
    stream.echoed = stream.echoed if start else [Token(stream.tokens[0])]
    foretold = stream.tokens[start + 1 : min(start + len(hidden_TD) + 1, stream.n_prompt)]
    for i in range(0, len(foretold), ECHO_ROWS):
        part = foretold[i : i + ECHO_ROWS]
        logits_RV = head(hidden_TD[i : i + len(part)]).cpu()
        stream.echoed += with_logprobs(logits_RV, [draft_row(stream)] * len(part), part)


def check(s: Sampling, vocab_size: int) -> None:
    """Raises RequestError for what no draw could follow."""
    ranges = {
        "temperature": (0, 100),
        "top_p": (1e-9, 1),
        "top_k": (0, 2**31),
        "min_p": (0, 1),
        "presence_penalty": (-100, 100),
        "frequency_penalty": (-100, 100),
        "repetition_penalty": (0.01, 100),
        "logprobs": (0, vocab_size),
        "seed": (-(2**63), 2**64 - 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(s, name)
        if value is not None and not low <= value <= high:
            raise RequestError(f"{name} {value}", f"{low} to {high}", f"choose another {name}", name)
    if 0 < s.temperature < MIN_TEMPERATURE:
        expected = f"0 or at least {MIN_TEMPERATURE}"
        raise RequestError(f"temperature {s.temperature}", expected, "0 draws the likeliest token", "temperature")
    for token, bias in s.logit_bias.items():
        if not (0 <= token < vocab_size and abs(bias) <= MOST_BIAS):
            expected = f"tokens below {vocab_size}, biases up to {MOST_BIAS:g}"
            raise RequestError(f"bias {bias} of token {token}", expected, "leave it out", "logit_bias")
