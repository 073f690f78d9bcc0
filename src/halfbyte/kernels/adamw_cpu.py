"""AdamW with eight-bit moments on a CPU: one pass of `cpu_loops.c` where there is a compiler."""

import ctypes
import inspect
import math

import torch

from halfbyte.kernels import adamw, codebooks, native


class _Settings(ctypes.Structure):
    """`struct adamw8` of `cpu_loops.c`."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            *("beta1", "beta2", "gain1", "gain2", "eps"),
            *("decay", "step_size", "root_correction2", "grad_scale"),
        )
    ]


def adamw8bit_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | torch.Tensor = 1.0,
) -> None:
    if math.isnan(grad_scale):
        return
    library = native.library()
    grad, numel = grad.contiguous(), param.numel()
    blocks = -(-numel // adamw.BLOCK_SIZE)
    fits = (
        all(native.is_vector(t, torch.float32, numel) for t in (param, grad))
        and all(native.is_vector(t, torch.uint8, numel) for t in (exp_avg, exp_avg_sq))
        and all(native.is_vector(t, torch.float32, blocks) for t in (absmax1, absmax2))
    )
    if library is None or not fits:
        inspect.unwrap(adamw.adamw8bit_step_)(
            param, grad, exp_avg, exp_avg_sq, absmax1, absmax2,
            step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
            grad_scale=grad_scale,
        )  # fmt: skip
        return
    settings = _Settings(
        beta1=beta1,
        beta2=beta2,
        gain1=1.0 - beta1,
        gain2=1.0 - beta2,
        eps=eps,
        decay=1.0 - lr * weight_decay,
        step_size=lr / (1.0 - beta1**step),
        root_correction2=math.sqrt(1.0 - beta2**step),
        grad_scale=float(grad_scale),
    )
    tables = [
        table(signed=is_signed)
        for table in (codebooks.dynamic_map, codebooks.dynamic_thresholds)
        for is_signed in (True, False)
    ]
    library.hb_adamw8(
        param.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        absmax1.data_ptr(),
        absmax2.data_ptr(),
        *[table.data_ptr() for table in tables],
        param.numel(),
        ctypes.byref(settings),
        torch.get_num_threads(),
    )
