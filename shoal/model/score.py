"""How likely a text is, token by token, by plain full forwards.

A text longer than a window is read in windows that overlap by half, and of each but the first only the second half
counts: so every token is judged with at least half a window before it, and memory doesn't grow with the text.

    0 ━━━━━━━━━━━━ w                             ━ counts
          w/2 ─────━━━━━━ 3w/2                   ─ is only read
                   w ─────━━━━━━ 2w

Shapes: T tokens, D model.
"""

import torch
from torch import Tensor

from shoal.model.attend import Packed
from shoal.model.transformer import Transformer

HEAD_ROWS = 256  # logits of so many tokens stand in memory at once


@torch.inference_mode()
def log_probs(model: Transformer, tokens_T: Tensor, window: int) -> Tensor:
    """Natural log-probabilities of every token after the first, given those before it; fp32 [T - 1]."""
    assert window >= 2, window
    found, step = [], window // 2
    for start in range(0, max(len(tokens_T) - window, 0) + step, step):
        new = start and window - step  # tokens that the window before has judged
        found.append(of_window(model, tokens_T[start : start + window], max(new, 1)))
    return torch.cat(found)


def of_window(model: Transformer, tokens_T: Tensor, first: int) -> Tensor:
    """Of the tokens from `first` on."""
    T = len(tokens_T)
    positions_T = torch.arange(T, device=tokens_T.device)
    hidden_TD = model.body(model.embed(tokens_T), positions_T, Packed([T]))[0][first - 1 : -1]
    rows = zip(hidden_TD.split(HEAD_ROWS), tokens_T[first:].split(HEAD_ROWS))
    each = [model.head(h).float().log_softmax(-1).gather(-1, next_T[:, None])[:, 0] for h, next_T in rows]
    return torch.cat(each) if each else hidden_TD.new_empty(0, dtype=torch.float32)
