"""The gated activation of a decoder's MLP, on CUDA: each element read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 4 warps x 8 elements of 16 bits = 16 bytes a thread and access.
_BLOCK = 1024


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _act_and_slope(gate, ACT: tl.constexpr):
    """Return act(gate) and its derivative."""
    if ACT == "silu":
        sig = tl.sigmoid(gate)
        act = gate * sig
        slope = sig + act * (1.0 - sig)
    else:
        # 0.5 g (1 + tanh(c (g + k g^3))), c = sqrt(2 / pi), k = 0.044715
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        tanh = _tanh(inner)
        act = 0.5 * gate * (1.0 + tanh)
        inner_slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * gate * gate)
        slope = 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh * tanh) * inner_slope
    return act, slope


@triton.jit
def _gated_forward_kernel(
    gate_up_ptr, out_ptr, stride_in, stride_out, size, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    gate = tl.load(gate_up_ptr + row * stride_in + offs, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * stride_in + size + offs, mask=mask, other=0.0)
    act, _ = _act_and_slope(gate.to(tl.float32), ACT)
    out = act * up.to(tl.float32)
    tl.store(out_ptr + row * stride_out + offs, out.to(gate.dtype), mask=mask)


@triton.jit
def _gated_backward_kernel(
    gate_up_ptr, grad_ptr, stride_in, stride_grad, size, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    gate_ptrs = gate_up_ptr + row * stride_in + offs
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
    grad_ptrs = grad_ptr + row * stride_grad + offs
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    act, slope = _act_and_slope(gate.to(tl.float32), ACT)
    tl.store(gate_ptrs, (grad * up * slope).to(gate.dtype), mask=mask)
    tl.store(gate_ptrs + size, (grad * act).to(gate.dtype), mask=mask)
    tl.store(grad_ptrs, (act * up).to(gate.dtype), mask=mask)


def gated_forward(gate_up: Tensor, size: int, activation: str, *, columns: int = 0) -> Tensor:
    T = gate_up.shape[0]
    out = torch.empty(T, size + columns, dtype=gate_up.dtype, device=gate_up.device)
    if T:
        _gated_forward_kernel[(T, triton.cdiv(size, _BLOCK))](
            gate_up, out, gate_up.stride(0), out.stride(0), size, ACT=activation, BLOCK=_BLOCK
        )
    return out


def gated_backward(
    gate_up: Tensor, grad_hidden: Tensor, size: int, activation: str
) -> tuple[Tensor, Tensor]:
    T = gate_up.shape[0]
    if T:
        _gated_backward_kernel[(T, triton.cdiv(size, _BLOCK))](
            gate_up, grad_hidden, gate_up.stride(0), grad_hidden.stride(0), size,
            ACT=activation, BLOCK=_BLOCK,
        )  # fmt: skip
    return gate_up, grad_hidden
