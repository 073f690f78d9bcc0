"""Rotary position embedding on CUDA: one program a token and a group of heads."""

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.sizes import cdiv, next_power_of_2

_HEADS = 8  # heads a program: 8 x 64 pairs keep four warps busy with 16-byte accesses


@triton.jit
def _rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, stride_t, stride_cos, N, D,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, BLOCK_HALF)
    pair_mask = pairs < HALF
    cos = tl.load(cos_ptr + t * stride_cos + pairs, mask=pair_mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * stride_cos + pairs, mask=pair_mask, other=0.0).to(tl.float32)
    ptrs = qkv_ptr + t * stride_t + heads[:, None] * D + pairs[None, :]
    mask = (heads < N)[:, None] & pair_mask[None, :]
    low = tl.load(ptrs, mask=mask, other=0.0)
    high = tl.load(ptrs + HALF, mask=mask, other=0.0)
    low32, high32 = low.to(tl.float32), high.to(tl.float32)
    tl.store(ptrs, (low32 * cos[None, :] - high32 * sin[None, :]).to(low.dtype), mask=mask)
    tl.store(ptrs + HALF, (high32 * cos[None, :] + low32 * sin[None, :]).to(low.dtype), mask=mask)


@triton.jit
def _rope_backward_kernel(
    grad_ptr, cos_ptr, sin_ptr, out_ptr,
    stride_gt, stride_gn, stride_cos, stride_out, first_column, N, D,
    ROTATED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    offs = tl.arange(0, BLOCK)
    mask = (heads < N)[:, None] & (offs < D)[None, :]
    # Heads may come one after the other, each with all of its tokens.
    source = grad_ptr + t * stride_gt + heads[:, None].to(tl.int64) * stride_gn
    value = tl.load(source + offs[None, :], mask=mask, other=0.0)
    if ROTATED:
        turning = offs < 2 * HALF
        is_low = offs < HALF
        partner = tl.where(is_low, offs + HALF, offs - HALF)
        partner = tl.where(turning, partner, offs)
        other = tl.load(source + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + t * stride_cos + offs, mask=turning, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + t * stride_cos + offs, mask=turning, other=0.0).to(tl.float32)
        sign = tl.where(is_low, 1.0, -1.0)
        turned = value.to(tl.float32) * cos[None, :] + other * (sin * sign)[None, :]
        value = turned.to(value.dtype)
    target = out_ptr + t * stride_out + first_column + heads[:, None] * D + offs[None, :]
    tl.store(target, value, mask=mask)


def rope_(qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
    T, _, D = qkv.shape
    half = cos.shape[-1] // 2
    if T:
        _rope_kernel[(T, cdiv(num_rotated, _HEADS))](
            qkv, cos, sin, qkv.stride(0), cos.stride(0), num_rotated, D,
            HALF=half, BLOCK_HALF=next_power_of_2(half), HEADS=_HEADS,
        )  # fmt: skip
    return qkv


def rope_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor, out: Tensor
) -> Tensor:
    T, _, D = grad_query.shape
    half = cos.shape[-1] // 2
    first_column = 0
    for grad, rotated in ((grad_query, True), (grad_key, True), (grad_value, False)):
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        heads = grad.shape[1]
        if T:
            _rope_backward_kernel[(T, cdiv(heads, _HEADS))](
                grad, cos, sin, out,
                grad.stride(0), grad.stride(1), cos.stride(0), out.stride(0), first_column,
                heads, D,
                ROTATED=rotated, HALF=half, BLOCK=next_power_of_2(D), HEADS=_HEADS,
            )  # fmt: skip
        first_column += heads * D
    return out
