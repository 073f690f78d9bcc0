"""Rotary position embedding on the query, key and value of one buffer.

Shape letters: T tokens, N heads (query, then key, then value heads), D head size.

Pairs are (i, i + D/2), as in transformers' `rotate_half` (Su et al. 2021, arXiv 2104.09864). Where
only the first part of a head rotates, `cos` and `sin` have fewer than D columns.
"""

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


@accelerated
def rope_(qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
    """Rotate the first `num_rotated` heads of `qkv` in place and return it.

    Args:
        qkv: `[T, N, D]`, heads and their elements contiguous (tokens may have a pitch).
        cos: `[T, R]`, R <= D even; both halves alike, as transformers makes them.
        sin: `[T, R]`.
        num_rotated: Number of query and key heads, which come first.
    """
    size = cos.shape[-1]
    wide_type = torch.promote_types(qkv.dtype, torch.float32)
    part = qkv[:, :num_rotated, :size]
    cos, sin = cos.to(wide_type)[:, None], sin.to(wide_type)[:, None]
    part.copy_(_rotate(part.to(wide_type), cos, sin))
    return qkv


@accelerated
def rope_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor, out: Tensor
) -> Tensor:
    """Turn the gradients of query and key back and write all three side by side into `out`.

    Args:
        grad_query: `[T, Nq, D]`; grad_key, grad_value: `[T, Nk, D]` (any strides).
        cos: `[T, R]`; sin: `[T, R]`.
        out: `[T, >= (Nq + 2 Nk) D]`, columns after those are left as they are.
    """
    num_tokens, _, head_dim = grad_query.shape
    num_rotated = grad_query.shape[1] + grad_key.shape[1]
    num_heads = num_rotated + grad_value.shape[1]
    heads = torch.cat((grad_query, grad_key, grad_value), dim=1)
    rope_.__wrapped__(heads, cos, -sin, num_rotated)  # type: ignore[attr-defined]
    out[:, : num_heads * head_dim] = heads.view(num_tokens, -1)
    return out
