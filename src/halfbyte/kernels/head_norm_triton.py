"""RMSNorm of every head of query and key on CUDA: one program a token and a group of heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.sizes import cdiv, next_power_of_2

_HEADS = 8  # heads a program: 8 x 128 elements keep four warps busy with 16-byte accesses


@triton.jit
def _head_norm_kernel(
    x_ptr, weight_ptr, out_ptr, stride_x, N, D, eps,
    BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    offs = tl.arange(0, BLOCK)
    mask = (heads < N)[:, None] & (offs < D)[None, :]
    inner = heads[:, None] * D + offs[None, :]
    x = tl.load(x_ptr + t * stride_x + inner, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + inner, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
    out = wide * scale[:, None] * weight
    tl.store(out_ptr + t * N * D + inner, out.to(x.dtype), mask=mask)


@triton.jit
def _head_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, stride_grad, stride_x, N, D, eps,
    BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    offs = tl.arange(0, BLOCK)
    mask = (heads < N)[:, None] & (offs < D)[None, :]
    inner = heads[:, None] * D + offs[None, :]
    x = tl.load(x_ptr + t * stride_x + inner, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + inner, mask=mask, other=0.0)
    grad_ptrs = grad_ptr + t * stride_grad + inner
    grad = tl.load(grad_ptrs, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    normed, outer = x * scale, grad.to(tl.float32) * weight
    grad_x = scale * (outer - normed * (tl.sum(outer * normed, 1) / D)[:, None])
    tl.store(grad_ptrs, grad_x.to(grad.dtype), mask=mask)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    T, N, D = x.shape
    out = torch.empty(T, N, D, dtype=x.dtype, device=x.device)
    if T:
        _head_norm_kernel[(T, cdiv(N, _HEADS))](
            x, weight, out, x.stride(0), N, D, eps, BLOCK=next_power_of_2(D), HEADS=_HEADS
        )
    return out


def head_norm_backward_(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    T, N, D = x.shape
    if T:
        _head_norm_backward_kernel[(T, cdiv(N, _HEADS))](
            grad, x, weight, grad.stride(0), x.stride(0), N, D, eps,
            BLOCK=next_power_of_2(D), HEADS=_HEADS,
        )  # fmt: skip
    return grad
