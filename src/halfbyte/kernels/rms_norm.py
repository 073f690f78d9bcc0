"""RMSNorm with the residual addition before it, for a frozen norm weight.

Shape letters: T tokens, H hidden size.

    residual = x + delta                       (skipped where there is no delta)
    normed   = residual * rsqrt(mean(residual^2) + eps) * weight

The mean and the product are float32 and rounded once (Zhang & Sennrich 2019, arXiv 1910.07467).
The weight is float32, with Gemma's `1 + w` already added, so that one kernel serves all families.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.border import new_with_border
from halfbyte.kernels.dispatch import accelerated


class Factors(NamedTuple):
    """What a norm multiplied x with: its output is made again as x is read, without the mean.

    Args:
        scale: float32 `[T]`, as `add_rms_norm` wrote it.
        weight: float32 `[H]`.
    """

    scale: Tensor
    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return x `[T, H]` normed, the same bits as the first time."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * self.scale[:, None] * self.weight).to(x.dtype)


@accelerated
def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    columns: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(residual, normed)`.

    Args:
        x: `[T, H]`, the residual stream, contiguous rows.
        delta: `[T, H]` to add first, or None; `residual` is then `x` itself.
        weight: `[H]` float32.
        eps: Added to the mean square.
        columns: Room for this many more columns after `normed`'s H, left unwritten: `normed` is
            then `[T, H + columns]`, ready to be the left operand of a product with LoRA inside.
        scale: `[T]` float32, filled with each row's `rsqrt(mean(residual^2) + eps)`; or None.
    """
    residual = x if delta is None else x + delta
    wide = residual.to(torch.promote_types(x.dtype, torch.float32))
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if scale is not None:
        scale.copy_(factor[:, 0])
    normed = new_with_border(x, x.shape[0], x.shape[1], columns)
    normed[:, : x.shape[1]] = (wide * factor * weight).to(x.dtype)
    return residual, normed


@accelerated
def rms_norm_backward(
    grad_normed: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_residual: Tensor | None,
    *,
    columns: int = 0,
) -> Tensor:
    """Return the gradient of `x` `[T, H]`: through the norm, plus `grad_residual` around it.

    Args:
        grad_normed: `[T, H]`, gradient of the normed output (rows may have a pitch).
        x: `[T, H]`, what was normed.
        weight: `[H]` float32; frozen, so it gets no gradient.
        eps: As in the forward.
        grad_residual: `[T, H]`, gradient that reaches `x` beside the norm, or None.
        columns: Room after the result, left unwritten: it is then `[T, H + columns]`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    grad = grad_normed.to(wide.dtype) * weight
    grad_x = scale * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    if grad_residual is not None:
        grad_x = grad_x + grad_residual
    out = new_with_border(x, x.shape[0], x.shape[1], columns)
    out[:, : x.shape[1]] = grad_x.to(x.dtype)
    return out


@dataclass(frozen=True)
class Norm:
    """A frozen RMSNorm: its float32 weight `[H]`, Gemma's 1 added, and epsilon."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor, *, columns: int = 0, scale: Tensor | None = None) -> Tensor:
        """Return the normed x; see `add_rms_norm`."""
        return add_rms_norm(x, None, self.weight, self.eps, columns=columns, scale=scale)[1]

    def backward(
        self, grad: Tensor, x: Tensor, beside: Tensor | None = None, *, columns: int = 0
    ) -> Tensor:
        """Return the gradient of x; see `rms_norm_backward`."""
        return rms_norm_backward(grad, x, self.weight, self.eps, beside, columns=columns)
