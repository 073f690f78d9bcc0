"""RMSNorm with the residual addition before it, on CUDA: one program a row, float32 inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.border import new_with_border
from halfbyte.kernels.sizes import next_power_of_2


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, residual_ptr, normed_ptr, scale_ptr,
    stride_x, stride_delta, stride_normed, H, eps,
    HAS_DELTA: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < H
    x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * stride_delta + offs, mask=mask, other=0.0)
        # Rounded before it is normed, as the reference does: the stored residual is what is normed.
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + row * H + offs, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    if HAS_SCALE:
        tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    tl.store(
        normed_ptr + row * stride_normed + offs, (wide * scale * weight).to(x.dtype), mask=mask
    )


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, residual_ptr, out_ptr,
    stride_grad, stride_x, stride_residual, stride_out, H, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < H
    x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    normed = wide * scale
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + row * stride_grad + offs, mask=mask, other=0.0).to(tl.float32)
    grad = grad * weight
    grad_x = scale * (grad - normed * (tl.sum(grad * normed, 0) / H))
    if HAS_RESIDUAL:
        beside = tl.load(residual_ptr + row * stride_residual + offs, mask=mask, other=0.0)
        grad_x += beside.to(tl.float32)
    tl.store(out_ptr + row * stride_out + offs, grad_x.to(x.dtype), mask=mask)


def _launch(H: int) -> tuple[int, int]:
    """Return (block, warps) for rows of H elements."""
    block = next_power_of_2(H)
    return block, min(max(block // 512, 1), 16)


def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    columns: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    T, H = x.shape
    normed = new_with_border(x, T, H, columns)
    residual = x if delta is None else torch.empty(T, H, dtype=x.dtype, device=x.device)
    if T == 0:
        return residual, normed
    block, warps = _launch(H)
    _add_rms_norm_kernel[(T,)](
        x, x if delta is None else delta, weight, residual, normed,
        weight if scale is None else scale,
        x.stride(0), 0 if delta is None else delta.stride(0), normed.stride(0), H, eps,
        HAS_DELTA=delta is not None, HAS_SCALE=scale is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return residual, normed


def rms_norm_backward(
    grad_normed: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_residual: Tensor | None,
    *,
    columns: int = 0,
) -> Tensor:
    T, H = x.shape
    out = new_with_border(x, T, H, columns)
    if T == 0:
        return out
    block, warps = _launch(H)
    beside = x if grad_residual is None else grad_residual
    _rms_norm_backward_kernel[(T,)](
        grad_normed, x, weight, beside, out,
        grad_normed.stride(0), x.stride(0), beside.stride(0), out.stride(0), H, eps,
        HAS_RESIDUAL=grad_residual is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out
