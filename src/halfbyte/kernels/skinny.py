"""Products with one small side, LoRA's ranks: reading the large side once is all their time.

Shape letters: T tokens, K features, R LoRA ranks (a few dozens). With D the dropout of what A
reads (`kernels/dropout.py`), made in registers, so that no dropped copy is written:

    rank_product_   D(x) A^T and dy B    `[T, K] x [K, R]`
    rank_gradient   gb^T D(x)            `[R, T] x [T, K]`, the gradient of A, in float32
                    and on the way, where asked, grad_x += D(gb A): the same mask, made once

What was normed is normed again as it is read, from one number a row.
"""

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated
from halfbyte.kernels.dropout import Mask, add_masked_product_, dropout
from halfbyte.kernels.rms_norm import Factors


@accelerated
def rank_product_(
    out: Tensor,
    x: Tensor,
    factor: Tensor,
    *,
    mask: Mask | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Write `x @ factor` into `out`; return that times `scaling`, as a tensor of its own.

    Args:
        out: `[T, R]` in the dtype of x (rows may have a pitch).
        x: `[T, K]` (rows may have a pitch).
        factor: `[K, R]` (any strides).
        mask: Of the dropout of x, or None.
        scaling: Of what is returned only; None returns `out` itself.
    """
    out.copy_((x if mask is None else dropout(x, mask)) @ factor)
    return out if scaling is None else out * scaling


@accelerated
def rank_gradient(
    gb: Tensor,
    x: Tensor,
    mask: Mask | None = None,
    lora_A: Tensor | None = None,
    grad_x: Tensor | None = None,
    norm: Factors | None = None,
) -> Tensor:
    """Return `gb^T x` `[R, K]` as float32 (or float64), its sum over tokens not rounded.

    Args:
        gb: `[T, R]` (rows may have a pitch).
        x: `[T, K]` (rows may have a pitch).
        mask: Of the dropout of x, or None.
        lora_A: `[R, K]` (rows may have a pitch), needed with a mask and `grad_x`.
        grad_x: `[T, K]`, to which `gb @ lora_A`, dropped as x is, is added in place; or None.
            Without a mask it is left alone: the product that made it had `lora_A` inside.
        norm: Of x, which is given as it was before; None: x is as it was read.
    """
    if norm is not None:
        x = norm(x)
    if mask is not None:
        x = dropout(x, mask)
        if grad_x is not None and lora_A is not None:
            add_masked_product_(grad_x, gb, lora_A, mask)
    return product_float32(gb.t(), x)


def product_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` as float32 (or float64), without rounding the sum to the inputs' dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.mm(a.to(wide), b.to(wide))
