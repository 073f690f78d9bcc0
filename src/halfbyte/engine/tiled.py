"""The second half of a block over a few thousand tokens at a time, for sequences that are long.

Of the tensors of a backward those of the MLP are the widest: gate, up and their gradients are 7 I
elements a token, where the rest of a layer has some 5 H. Nothing in that half looks at another
token, so it may run over one tile of tokens after the other:

    forward     for each tile     attention, x ─ o ─ add ─ norm ─ gate, up ─ down ─ add ─► y
    backward    for each tile     the same again, keeping everything, then backward

Only attention and x are saved. The wide matrices are made once for all tiles. Gradients of adapters
are float32 sums over tiles: they differ from those of one run in the order of addition only. The
dropout of a row depends on its number, so a tile drops what the whole would have dropped.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.engine.block import Keep
from halfbyte.engine.projections import Siblings

Half = Callable[[Tensor, Tensor, Keep, Tensor | None], Tensor]
"""`(attention, x, keep, seed)` to y: the second half of a block over some tokens."""


class Tiled(torch.autograd.Function):
    """`(attention [T, N D], x [T, H])` to y `[T, H]`, a tile at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        attention: Tensor,
        x: Tensor,
        half: Half,
        siblings: Sequence[Siblings],
        keep: Keep,
        seed: Tensor | None,
        *adapters: Tensor,
    ) -> Tensor:
        """Return y.

        Args:
            attention: Of all heads.
            x: The residual stream.
            half: What runs over a tile; with `keep.everything` it saves all that its backward
                needs.
            siblings: Its projections.
            keep: `keep.tile` tokens are a tile; what it says else, counts for nothing.
            seed: int64 `[2]`, or None.
            adapters: What `half` gives gradients to, in any order.
        """
        y = torch.empty_like(x)
        if not keep.is_again:  # nobody reads it then, and each tile's backward runs it once more
            with _staying(siblings):
                for rows in _tiles(x, keep.tile):
                    part = Keep(everything=False)
                    y[rows] = half(attention[rows], x[rows], part, _seed_of(seed, rows))
        ctx.save_for_backward(attention, x, seed)
        ctx.half, ctx.siblings, ctx.tile, ctx.adapters = half, siblings, keep.tile, adapters
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of attention, x and the adapters."""
        (grad_y,) = grads
        attention, x, seed = ctx.saved_tensors
        trained = [adapter for adapter in ctx.adapters if adapter.requires_grad]
        grad_attention, grad_x = torch.empty_like(attention), torch.empty_like(x)
        sums: list[Tensor] = []
        with _staying(ctx.siblings):
            for rows in _tiles(x, ctx.tile):
                inputs = [t[rows].detach().requires_grad_() for t in (attention, x)]
                keep = Keep(everything=True, is_again=True)
                with torch.enable_grad():
                    y = ctx.half(*inputs, keep, _seed_of(seed, rows))
                found = torch.autograd.grad(y, [*inputs, *trained], grad_y[rows])
                grad_attention[rows], grad_x[rows] = found[:2]
                if sums:
                    torch._foreach_add_(sums, found[2:])
                else:
                    sums = list(found[2:])
                del y, found
        of_trained = iter(sums)
        of_adapters = (next(of_trained) if a.requires_grad else None for a in ctx.adapters)
        return grad_attention, grad_x, *[None] * 4, *of_adapters


def _tiles(x: Tensor, size: int) -> Iterator[slice]:
    for start in range(0, x.shape[0], size):
        yield slice(start, min(start + size, x.shape[0]))


def _seed_of(seed: Tensor | None, rows: slice) -> Tensor | None:
    """Return the seed with the number of a tile's first row, made on the device."""
    if seed is None or rows.start == 0:
        return seed
    own = seed.clone()
    own[1] += rows.start
    return own


@contextlib.contextmanager
def _staying(siblings: Sequence[Siblings]) -> Iterator[None]:
    """Let wide matrices stay over all tiles, and go after them where they are not to stay."""
    passing = [s.stay for s in siblings if not s.stay.granted]
    for stay in passing:
        stay.granted = True
    try:
        yield
    finally:
        for stay in passing:
            stay.end()
