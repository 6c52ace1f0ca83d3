"""What is remembered of every token, page by page.

A latent layer keeps one row a token: c after its norm, and k_rope turned, C + R numbers whatever the number of heads
(576 for V3, where its heads' own keys and values would be 40,960). A grouped-query layer keeps k and v. The first
multi-token module, where it drafts, counts as one layer more.

Shapes: P pages, U tokens in a page, C latent, R rope, G key-value heads, K head dims, T tokens.
"""

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from shoal.engine.pages import UNIT
from shoal.errors import ResourceError
from shoal.model.config import MLAConfig, ModelConfig

SHARE_OF_MEMORY = 0.25  # of what is free, for the cache, where nothing is said; at most CONTEXTS whole contexts
CONTEXTS = 16


def row_shapes(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """What a layer keeps of a token: the latent, or k and v."""
    a = config.attention
    if isinstance(a, MLAConfig):
        return ((a.kv_lora_rank + a.qk_rope_head_dim,),)
    return ((a.n_kv_heads, a.head_dim),) * 2


def bytes_per_token(config: ModelConfig, n_layers: int, dtype: torch.dtype) -> int:
    numbers = sum(torch.Size(shape).numel() for shape in row_shapes(config))
    return numbers * n_layers * dtype.itemsize


def pages_that_fit(memory_bytes: int | None, page_bytes: int, a_context: int, device: torch.device) -> int:
    """In so many bytes, or where nothing is said, in a share of what is free. Raises ResourceError where none does."""
    if memory_bytes is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        memory_bytes = min(int(SHARE_OF_MEMORY * free), CONTEXTS * a_context * page_bytes)
    page_fits(memory_bytes, page_bytes, "the cache")
    return memory_bytes // page_bytes


def page_fits(n_bytes: int, page_bytes: int, what: str) -> None:
    """Raises ResourceError where it doesn't."""
    if n_bytes < page_bytes:
        fix = f"give it at least {page_bytes} bytes"
        raise ResourceError(f"{n_bytes} bytes for {what}", f"room for a page of {page_bytes} bytes", fix)


class Cache:
    """`layers[i]` is (latent [P, U, C + R],) or (k [P, U, G, K], v [P, U, G, K])."""

    def __init__(self, config: ModelConfig, n_layers: int, n_pages: int, dtype: torch.dtype, device: torch.device):
        # Zeros: what stands behind a stream's last token is read too, and weighed by 0; but 0 · NaN is NaN.
        self.layers = [
            tuple(torch.zeros(n_pages, UNIT, *shape, dtype=dtype, device=device) for shape in row_shapes(config))
            for _ in range(n_layers)
        ]
        self.device = device

    def write(self, layer: int, slots_T: Tensor, *rows: Tensor) -> None:
        """One row a token, at page · U + place in the page."""
        for kept, new in zip(self.layers[layer], rows, strict=True):
            kept.flatten(0, 1).index_copy_(0, slots_T, new.to(kept.dtype))

    def read(self, layer: int, slots_S: Tensor) -> list[Tensor]:
        return [kept.flatten(0, 1).index_select(0, slots_S) for kept in self.layers[layer]]

    def page(self, page: int) -> Tensor:
        """A copy of all that a page holds, [n] uint8 on the CPU."""
        return torch.cat([kept[page].flatten().view(torch.uint8) for layer in self.layers for kept in layer]).cpu()

    def set_page(self, page: int, data_N: Tensor) -> None:
        """The inverse of `page`."""
        all_kept = [kept for layer in self.layers for kept in layer]
        for kept, part in zip(all_kept, data_N.split([kept[page].nbytes for kept in all_kept]), strict=True):
            kept[page] = part.view(kept.dtype).view(kept.shape[1:])

    def clear(self, pages: Sequence[int]) -> None:
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        for layer in self.layers:
            for kept in layer:
                kept.index_fill_(0, index, 0)
