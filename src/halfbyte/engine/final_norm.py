"""The norm after the last layer, which keeps its input and nothing else for the backward.

transformers' own makes four float32 copies of the hidden states on the way, and their backward
was the peak of a step with few layers saved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.engine.families import family_of, norm_of
from halfbyte.kernels.rms_norm import Norm


class RmsNorm(torch.autograd.Function):
    """`x` `[T, H]` to its RMSNorm, for a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        """Return `[T, H]` in the dtype of x."""
        ctx.norm = norm
        ctx.save_for_backward(x)
        return norm(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        (x,) = ctx.saved_tensors
        return ctx.norm.backward(grads[0].contiguous(), x), None


def final_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Return `norm(x)` for x `[T, H]`, fused where the norm is a frozen RMSNorm.

    Args:
        norm: The body's last module.
        x: What the last layer gave.
    """
    family = family_of(norm)
    if family is None or any(weight.requires_grad for weight in norm.parameters()):
        normed: Tensor = norm(x)
        return normed
    return RmsNorm.apply(x, norm_of(norm, family))
