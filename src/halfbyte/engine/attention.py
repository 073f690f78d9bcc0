"""Causal attention for one batch, dense or packed, by the fastest backend that fits.

Shape letters: B sequences, S tokens of each, T = B * S, N query heads,
M key-value heads, D head size.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from halfbyte.kernels.attention import causal_attention
from halfbyte.kernels.sizes import next_power_of_2

# cuDNN before flash: 1.7 to 1.8 times its speed on Hopper (benchmarks/results).
_DENSE = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Flash attention's gradient counts the elements of q before a sequence in 32 bits.
_MAX_ELEMENTS = 2**31


@dataclass(frozen=True)
class Layout:
    """How tokens of a flat batch belong to sequences.

    Args:
        batch: B; 1 when packed.
        length: S.
        cu_seqlens: int32 `[documents + 1]` on the device, the bounds of packed documents, or None
            when every row is one sequence.
        max_length: The longest document; S when not packed.
    """

    batch: int
    length: int
    cu_seqlens: Tensor | None = None
    max_length: int = 0

    @property
    def num_sequences(self) -> int:
        """Rows, or packed documents."""
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.numel() - 1


def backends() -> AbstractContextManager[None]:
    """Return a context in which dense attention takes the fastest backend that fits.

    Entered once for all layers: entering it for each would cost the host more than a launch.
    """
    return sdpa_kernel(_DENSE, set_priority=True)


def has_windows() -> bool:
    """Whether every backend here has sliding windows; that for packed batches is PyTorch's."""
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return causal attention within each sequence.

    Args:
        query: `[T, N, D]`; key, value: `[T, M, D]`, N a multiple of M.
        layout: Which tokens belong together.
        scale: What the scores are multiplied with.
        window: How many tokens a token sees, itself one of them; None: all before it.

    Returns:
        `[T, N * D]`.
    """
    head_size = next_power_of_2(query.shape[2])  # as kernels pad it, or more
    too_many = query.shape[0] * query.shape[1] * head_size > _MAX_ELEMENTS
    if too_many and layout.num_sequences > 1:
        halves = (
            attention(query[rows], key[rows], value[rows], half, scale, window)
            for rows, half in _halves(layout)
        )
        return torch.cat(list(halves))
    longest = layout.length if layout.cu_seqlens is None else layout.max_length
    if window is not None and window >= longest:
        window = None  # which other, faster backends can do too
    is_packed = layout.cu_seqlens is not None and layout.num_sequences > 1
    if is_packed or (window is not None and query.is_cuda):
        out = _packed(query, key, value, layout, scale, window)
        return out.reshape(query.shape[0], -1)
    shape = (layout.batch, layout.length)
    q, k, v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
    out = causal_attention(q, k, v, scale=scale, window=window)
    return out.transpose(1, 2).reshape(query.shape[0], -1)


def _halves(layout: Layout) -> list[tuple[slice, Layout]]:
    """Return the tokens and the layouts of the first half of the sequences and of the second."""
    bounds, middle = layout.cu_seqlens, layout.num_sequences // 2
    if bounds is None:
        tokens = middle * layout.length
        first, second = replace(layout, batch=middle), replace(layout, batch=layout.batch - middle)
    else:
        tokens = int(bounds[middle])  # waits for the device: nothing beside so many tokens
        first = replace(layout, length=tokens, cu_seqlens=bounds[: middle + 1])
        rest = layout.length - tokens
        second = replace(layout, length=rest, cu_seqlens=bounds[middle:] - tokens)
    return [(slice(tokens), first), (slice(tokens, None), second)]


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
) -> Tensor:
    bounds, longest = layout.cu_seqlens, layout.max_length
    if bounds is None:
        steps = torch.arange(layout.batch + 1, dtype=torch.int32, device=query.device)
        bounds, longest = steps * layout.length, layout.length
    if query.is_cuda:
        left = -1 if window is None else window - 1
        return _varlen()(query, key, value, bounds, longest, scale, left)
    # The reference: one dense attention a document.
    edges = bounds.tolist()
    parts = []
    for start, end in itertools.pairwise(edges):
        if end > start:
            one, rows = Layout(1, end - start), slice(start, end)
            part = attention(query[rows], key[rows], value[rows], one, scale, window)
            parts.append(part.view(end - start, *query.shape[1:]))
    return torch.cat(parts)


@functools.cache
def _varlen() -> Callable[..., Tensor]:
    """Return a call of torch's variable-length attention in the words of this torch version."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        longest: int,
        scale: float,
        left: int,
    ) -> Tensor:
        # Without `window_size` there is no window either: `has_windows` says so before.
        is_new = "window_size" in names
        options: dict[str, Any] = {"window_size": (left, 0)} if is_new else {"is_causal": True}
        options["scale"] = scale
        if query.shape[1] != key.shape[1] and "enable_gqa" in names:
            options["enable_gqa"] = True
        out = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
        return cast(Tensor, out)

    return call
