"""The norm after the last layer, which keeps its input and nothing else for the backward.

transformers' own makes four float32 copies of the hidden states on the way, and their backward
was the peak of a step with few layers saved.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels.rms_norm import add_rms_norm, rms_norm_backward

_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")


class RmsNorm(torch.autograd.Function):
    """`x` `[T, H]` to its RMSNorm, for a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return `[T, H]` in the dtype of x; `weight` is float32."""
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return add_rms_norm(x, None, weight, eps)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        x, weight = ctx.saved_tensors
        return rms_norm_backward(grads[0].contiguous(), x, weight, ctx.eps, None), None, None


def final_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Return `norm(x)` for x `[T, H]`, fused where the norm is a frozen RMSNorm.

    Args:
        norm: The body's last module.
        x: What the last layer gave.
    """
    weight: Any = getattr(norm, "weight", None)
    if type(norm).__name__ not in _RMS_NORMS or weight.requires_grad:
        normed: Tensor = norm(x)
        return normed
    fused: Any = norm
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return RmsNorm.apply(x, wide, float(fused.variance_epsilon))
