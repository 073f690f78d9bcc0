"""The softmax, loss and gradient of a chunk of logits on CUDA, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _cap(z, scale, softcap, HAS_CAP: tl.constexpr):
    z = z * scale
    if HAS_CAP:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _softmax_loss_kernel(
    logits_ptr, bias_ptr, target_ptr, loss_ptr, stride, V, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride
    target = tl.load(target_ptr + row)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    chosen = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < V
        z = tl.load(base + offs, mask=mask, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        z = tl.where(mask, _cap(z, scale, softcap, HAS_CAP), float("-inf"))
        new = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), 0)
        chosen += tl.sum(tl.where(offs == target, z, 0.0), 0)
        largest = new
    log_sum = largest + tl.log(total)
    tl.store(loss_ptr + row, log_sum - chosen)
    for start in range(0, V, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < V
        raw = tl.load(base + offs, mask=mask, other=0.0)
        z = raw.to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        z = _cap(z, scale, softcap, HAS_CAP)
        grad = tl.exp(z - log_sum) - tl.where(offs == target, 1.0, 0.0)
        if HAS_CAP:
            grad *= 1.0 - (z / softcap) * (z / softcap)
        tl.store(base + offs, (grad * scale).to(raw.dtype), mask=mask)


def softmax_loss_(
    logits: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    rows, vocabulary = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _softmax_loss_kernel[(rows,)](
            logits, logits if bias is None else bias, target, loss, logits.stride(0), vocabulary,
            logit_scale, 1.0 if softcap is None else softcap,
            HAS_BIAS=bias is not None, HAS_CAP=softcap is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return loss
