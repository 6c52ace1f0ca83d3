"""One step's work through the model: flat tokens in, hidden states and the logits that are drawn from out.

`Runner` gives single tokens and short spans to the `Decoder` where the machine has one, and the chunks of prompts to
the model's own forward pass; `Invariant` gives everything to the Decoder, whose rows don't change each other. Where
there is no Decoder, `Runner` feeds all tokens at once, and `Invariant` every token alone: the same token behind the
same prefix then always meets products of the same shapes. Either way its numbers are the same to the last bit, whoever
else is in the batch, however prompts are cut into chunks, whether a prefix was found in the cache or computed, and
whether a token came as a draft.

Shapes: T tokens of the step, D model, R rows drawn from, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine import decode
from shoal.engine.attend import FEW, Paged, Span
from shoal.engine.cache import Cache
from shoal.engine.scheduler import Work
from shoal.model.transformer import Transformer


class Runner:
    def __init__(self, model: Transformer, cache: Cache):
        self.model, self.cache = model, cache
        self.decoder = decode.Decoder(model, cache) if decode.takes(model) else None

    def run(self, work: Sequence[Work]) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm [T, D], in the order of `work`, and logits [R, V] (fp32)."""
        spans = [Span(w.start, len(w.tokens), w.stream.pages) for w in work]
        hidden_TD = self.body([t for w in work for t in w.tokens], spans)
        rows = drawn_rows(work)
        return hidden_TD, self.head(hidden_TD if len(rows) == len(hidden_TD) else hidden_TD[rows])

    def body(self, tokens: list[int], spans: Sequence[Span]) -> Tensor:
        """The shortest spans first."""
        few = self._few(spans)
        n = sum(span.n for span in spans[:few])
        parts = [self.decoder.body(tokens[:n], spans[:few])] if self.decoder and n else []
        if n < len(tokens):
            embedded_TD = self.model.embed(self._tensor(tokens[n:]))
            attend = Paged(self.cache, spans[few:])
            parts.append(self.model.body(embedded_TD, self._positions(spans[few:]), attend)[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def head(self, hidden_RD: Tensor) -> Tensor:
        return self.decoder.head(hidden_RD) if self.decoder else self.model.head(hidden_RD).float()

    def module(self, hidden_TD: Tensor, following: list[int], spans: Sequence[Span]) -> Tensor:
        """The multi-token module's hidden states [T, D], from the model's and the tokens that follow."""
        few = self._few(spans)
        n = sum(span.n for span in spans[:few])
        parts = [self.decoder.module(hidden_TD[:n], following[:n], spans[:few])] if self.decoder and n else []
        if n < len(following):
            embedded_TD = self.model.embed(self._tensor(following[n:]))
            positions_T, attend = self._positions(spans[few:]), Paged(self.cache, spans[few:])
            parts.append(self.model.mtp[0](hidden_TD[n:], embedded_TD, positions_T, attend)[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _few(self, spans: Sequence[Span]) -> int:
        """How many of the spans go to the Decoder."""
        return sum(span.n <= FEW for span in spans) if self.decoder else 0

    def _positions(self, spans: Sequence[Span]) -> Tensor:
        return self._tensor([i for span in spans for i in range(span.start, span.end)])

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.cache.device)


class Invariant(Runner):
    def body(self, tokens: list[int], spans: Sequence[Span]) -> Tensor:
        if self.decoder:
            return self.decoder.body(tokens, spans)
        alone = [Span(i, 1, span.pages) for span in spans for i in range(span.start, span.end)]
        return torch.cat([super(Invariant, self).body([t], [span]) for t, span in zip(tokens, alone, strict=True)])

    def head(self, hidden_RD: Tensor) -> Tensor:
        if self.decoder:
            return self.decoder.head(hidden_RD)
        # cloned: a product may round otherwise where its rows begin at another alignment
        rows = [super(Invariant, self).head(row.clone()) for row in hidden_RD.split(1)]
        return torch.cat(rows) if rows else super().head(hidden_RD)


def drawn_rows(work: Sequence[Work]) -> list[int]:
    """The last `draws` rows of each."""
    rows, end = [], 0
    for w in work:
        end += len(w.tokens)
        rows += range(end - w.draws, end)
    return rows
