r"""A linear layer with a low-rank update: `y = x W^T + b + s · dropout(x) A^T B^T`, W frozen.

LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1) trains A and B; QLoRA (Dettmers et al. 2023,
arXiv 2305.14314, equation 5) holds W in four bits and dequantizes it for each product. Plain
autograd would keep the dequantized W, or a copy of it, from the forward to the backward, and would
write the low-rank update out before adding it. Here W lives for one product at a time, and the
update is accumulated into `y` and `grad_x` inside the small products themselves:

    forward    xA = dropout(x) A^T           y = x W^T + b,        y += s · xA B^T
    backward   g  = grad_y B                 grad_B = s · grad_y^T xA,   grad_A = s · g^T dropout(x)
               grad_x = grad_y W,            grad_x += s · mask(g A)

Products run in the dtype of `x` and accumulate in float32. Saved for the backward: x, xA, A and B
in the dtype of x, and with dropout a mask of one byte per element of x; `1 / (1 - p)` is folded
into s, so dropping rounds nothing.

Shape letters: T rows of x, I in features, O out features, R rank.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.kernels.linear_4bit import PackedMatrix, grad_input_4bit, linear_4bit

Weight = Tensor | PackedMatrix


def _product(x_TI: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor):
        return F.linear(x_TI, weight.to(x_TI.dtype), bias)
    return linear_4bit(x_TI, weight, bias)


def _grad_input(grad_TO: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return grad_TO @ weight.to(grad_TO.dtype)
    return grad_input_4bit(grad_TO, weight)


def _gradient(left: Tensor, right: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return `scaling · left @ right` in `dtype`, not rounded to 16 bits before where BLAS can."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32).mul_(scaling)
    return torch.mm(left, right).to(dtype).mul_(scaling)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight: Weight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        mask_TI: Tensor | None,
    ) -> Tensor:
        dtype = x_TI.dtype
        A_RI, B_OR = lora_A.to(dtype), lora_B.to(dtype)
        xA_TR = (x_TI if mask_TI is None else x_TI * mask_TI) @ A_RI.t()
        y_TO = _product(x_TI, weight, None if bias is None else bias.to(dtype))
        y_TO.addmm_(xA_TR, B_OR.t(), alpha=scaling)

        needs_A, needs_B = ctx.needs_input_grad[3:5]
        ctx.weight, ctx.scaling = weight, scaling
        ctx.dtypes = (lora_A.dtype, lora_B.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(
            x_TI if needs_A else None, xA_TR if needs_B else None, A_RI, B_OR, mask_TI
        )
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        x_TI, xA_TR, A_RI, B_OR, mask_TI = ctx.saved_tensors
        dtype_A, dtype_B, dtype_bias = ctx.dtypes
        grad_x = grad_A = grad_B = grad_bias = None
        if needs_bias:
            grad_bias = grad_TO.sum(0, dtype=dtype_bias)
        if needs_B:
            # Transposed: BLAS libraries are quicker with the long side as columns.
            grad_B = _gradient(xA_TR.t(), grad_TO, ctx.scaling, dtype_B).t()
        if needs_x or needs_A:
            g_TR = grad_TO @ B_OR
        if needs_A:
            dropped_TI = x_TI if mask_TI is None else x_TI * mask_TI
            grad_A = _gradient(g_TR.t(), dropped_TI, ctx.scaling, dtype_A)
        if needs_x:
            grad_x = _grad_input(grad_TO, ctx.weight)
            if mask_TI is None:
                grad_x.addmm_(g_TR, A_RI, alpha=ctx.scaling)
            else:
                grad_x.add_((g_TR @ A_RI).mul_(mask_TI), alpha=ctx.scaling)
        return grad_x, None, grad_bias, grad_A, grad_B, None, None


def lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Return `x W^T + b + scaling · dropout(x) A^T B^T` as `[..., O]` in the dtype of `x`.

    Under autocast `x` is cast to autocast's dtype first. The dropout mask comes from the default
    random generator of x's device, so a seed fixes it and gradient checkpointing repeats it.

    Args:
        x: `[..., I]`, any floating dtype; no rows is fine.
        weight: Frozen, `[O, I]`: a dense tensor or a quantized one. It gets no gradient.
        bias: `[O]` or None.
        lora_A: `[R, I]`, usually a float32 master; its gradient has its dtype.
        lora_B: `[O, R]`, likewise.
        scaling: Factor of the update, `alpha / r` or `alpha / sqrt(r)`.
        dropout_p: Probability, in [0, 1), of dropping an element of the update's input.
        training: Whether to drop at all.

    Raises:
        ValueError: the shapes do not fit together, or `dropout_p` is outside [0, 1).
    """
    out_features, in_features = weight.shape
    rank = lora_A.shape[0]
    if x.shape[-1] != in_features or lora_A.shape[1] != in_features:
        raise ValueError(
            f"x {tuple(x.shape)} and lora_A {tuple(lora_A.shape)} must end in {in_features}, "
            f"the weight's in features"
        )
    if lora_B.shape != (out_features, rank):
        raise ValueError(f"lora_B must be {(out_features, rank)}, got {tuple(lora_B.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))

    rows = x.reshape(math.prod(x.shape[:-1]), in_features)
    mask = None
    if training and dropout_p > 0.0:
        mask = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1.0 - dropout_p)
        scaling = scaling / (1.0 - dropout_p)
    y = _LoraLinear.apply(rows, weight, bias, lora_A, lora_B, scaling, mask)
    return cast(Tensor, y).view(*x.shape[:-1], out_features)
