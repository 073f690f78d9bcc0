"""AdamW on CUDA: gradient scale, moments, update and requantization in one pass."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math

import torch
import triton
import triton.language as tl

from halfbyte.kernels.nf4_triton import dynamic_table, nearest
from halfbyte.kernels.sizes import cdiv

_SIZE = 1024
_BLOCKS_AT_ONCE = 4
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
# Index of 0 in the signed map.
_SIGNED_ZERO = tl.constexpr(127)


@triton.jit
def _update(p, m, v, decay, step_size, root_correction2, eps):
    return p * decay - step_size * (m / (tl.sqrt(v) / root_correction2 + eps))


@triton.jit
def _adamw_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, scale_ptr, numel, grad_scale,
    beta1, beta2, gain1, gain2, eps, decay, step_size, root_correction2,
    SIZE: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    scale = tl.load(scale_ptr) if SCALE_IS_TENSOR else grad_scale
    mask = offs < tl.where(scale == scale, numel, 0)  # nothing for NaN
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0) * scale
    m = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0)
    p = tl.load(param_ptr + offs, mask=mask, other=0.0)
    m = m * beta1 + g * gain1
    v = v * beta2 + g * g * gain2
    p = _update(p, m, v, decay, step_size, root_correction2, eps)
    tl.store(exp_avg_ptr + offs, m, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, v, mask=mask)
    tl.store(param_ptr + offs, p, mask=mask)


@triton.jit
def _encode(moment, thresholds_ptr, IS_SIGNED: tl.constexpr):
    """Return the nearest codes of rows of 256, and the rows' largest magnitudes."""
    absmax = tl.max(tl.abs(moment), axis=1)
    x = moment / tl.maximum(absmax, _SMALLEST_NORMAL)[:, None]
    code = nearest(thresholds_ptr, x)
    if IS_SIGNED:
        # As bitsandbytes: what would round to the zero in the middle from below stays negative.
        code = tl.where((code == _SIGNED_ZERO) & (x < 0), _SIGNED_ZERO - 1, code)
    return code.to(tl.uint8), absmax


@triton.jit
def _adamw8bit_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, absmax1_ptr, absmax2_ptr,
    map1_ptr, map2_ptr, thresholds1_ptr, thresholds2_ptr, scale_ptr, numel, grad_scale,
    beta1, beta2, gain1, gain2, eps, decay, step_size, root_correction2,
    BLOCKS: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = tl.load(scale_ptr) if SCALE_IS_TENSOR else grad_scale
    numel = tl.where(scale == scale, numel, 0)  # nothing for NaN
    row_mask = rows * 256 < numel
    offs = rows[:, None] * 256 + tl.arange(0, 256)[None, :]
    mask = offs < numel
    g = tl.load(grad_ptr + offs, mask=mask, other=0.0) * scale
    p = tl.load(param_ptr + offs, mask=mask, other=0.0)
    code1 = tl.load(exp_avg_ptr + offs, mask=mask, other=0).to(tl.int32)
    code2 = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0).to(tl.int32)
    absmax1 = tl.load(absmax1_ptr + rows, mask=row_mask, other=0.0)
    absmax2 = tl.load(absmax2_ptr + rows, mask=row_mask, other=0.0)
    m = tl.load(map1_ptr + code1) * absmax1[:, None] * beta1 + g * gain1
    v = tl.load(map2_ptr + code2) * absmax2[:, None] * beta2 + g * g * gain2
    p = _update(p, m, v, decay, step_size, root_correction2, eps)
    tl.store(param_ptr + offs, p, mask=mask)
    # Beyond the end the state reads as code 0 of the last block's scale: keep that out of absmax.
    code1, absmax1 = _encode(tl.where(mask, m, 0.0), thresholds1_ptr, IS_SIGNED=True)
    code2, absmax2 = _encode(tl.where(mask, v, 0.0), thresholds2_ptr, IS_SIGNED=False)
    tl.store(exp_avg_ptr + offs, code1, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, code2, mask=mask)
    tl.store(absmax1_ptr + rows, absmax1, mask=row_mask)
    tl.store(absmax2_ptr + rows, absmax2, mask=row_mask)


def _settings(step, lr, beta1, beta2, eps, weight_decay, grad_scale):
    """Return what both kernels take alike: numbers, and where the gradient's scale is."""
    is_tensor = isinstance(grad_scale, torch.Tensor)
    return {
        "grad_scale": 1.0 if is_tensor else float(grad_scale),
        "beta1": beta1,
        "beta2": beta2,
        # Subtracted here: in float32 1 - 0.999 is off by 5e-5 of itself.
        "gain1": 1.0 - beta1,
        "gain2": 1.0 - beta2,
        "eps": eps,
        "decay": 1.0 - lr * weight_decay,
        "step_size": lr / (1.0 - beta1**step),
        "root_correction2": math.sqrt(1.0 - beta2**step),
        "SCALE_IS_TENSOR": is_tensor,
    }


def adamw_step_(
    param, grad, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, grad_scale=1.0
):
    settings = _settings(step, lr, beta1, beta2, eps, weight_decay, grad_scale)
    scale = grad_scale if settings["SCALE_IS_TENSOR"] else param
    _adamw_kernel[(cdiv(param.numel(), _SIZE),)](
        param, grad.contiguous(), exp_avg, exp_avg_sq, scale, param.numel(),
        SIZE=_SIZE, **settings,
    )  # fmt: skip


def adamw8bit_step_(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    absmax1,
    absmax2,
    *,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    grad_scale=1.0,
):
    settings = _settings(step, lr, beta1, beta2, eps, weight_decay, grad_scale)
    scale = grad_scale if settings["SCALE_IS_TENSOR"] else param
    device = param.device
    _adamw8bit_kernel[(cdiv(param.numel(), 256 * _BLOCKS_AT_ONCE),)](
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        absmax1,
        absmax2,
        dynamic_table("dynamic_map", device, is_signed=True),
        dynamic_table("dynamic_map", device, is_signed=False),
        dynamic_table("dynamic_thresholds", device, is_signed=True),
        dynamic_table("dynamic_thresholds", device, is_signed=False),
        scale,
        param.numel(),
        BLOCKS=_BLOCKS_AT_ONCE,
        **settings,
    )
