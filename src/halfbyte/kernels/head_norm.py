"""RMSNorm of every head of query and key, for frozen weights.

Shape letters: T tokens, N heads, D head size.

    out = x * rsqrt(mean over D of x^2 + eps) * weight

Qwen3 and Gemma 3 do so before the rotary embedding. Heads lie inside the wider rows of a buffer of
query, key and value, so their rows have no common pitch, which `rms_norm` would need; and queries
and keys have weights of their own, which here are rows of one table.
"""

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated


@accelerated
def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the normed heads, `[T, N, D]` contiguous, in the dtype of x.

    Args:
        x: `[T, N, D]`, heads and their elements contiguous (tokens may have a pitch).
        weight: float32 `[N, D]`.
        eps: Added to the mean square.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


@accelerated
def head_norm_backward_(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Turn the gradient of the normed heads into that of x, in place, and return it.

    Args:
        grad: `[T, N, D]`, heads and their elements contiguous (tokens may have a pitch).
        x, weight, eps: As in the forward; the weight is frozen, so it gets no gradient.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed, outer = wide * scale, grad.to(wide.dtype) * weight
    grad.copy_(scale * (outer - normed * (outer * normed).mean(-1, keepdim=True)))
    return grad
