"""Dropout whose mask is a function of a seed, on CUDA: Philox numbers counted by element."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dropout import Mask

_BLOCK = 2048


@triton.jit
def kept(seed_ptr, salt, row, column, K, p):
    """Return where an element stays: one Philox draw an element."""
    seed = tl.load(seed_ptr) + tl.cast(salt, tl.int64) * 0x3C6EF373
    first_row = tl.load(seed_ptr + 1)
    number = tl.rand(seed, ((first_row + row) * K + column).to(tl.int32))
    return number >= p


@triton.jit
def _dropout_kernel(x_ptr, out_ptr, seed_ptr, stride, K, p, salt, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    x = tl.load(x_ptr + row * stride + offs, mask=mask, other=0.0)
    stays = kept(seed_ptr, salt, row, offs, K, p)
    value = tl.where(stays, x.to(tl.float32) / (1.0 - p), 0.0)
    tl.store(out_ptr + row * K + offs, value.to(x.dtype), mask=mask)


@triton.jit
def _add_masked_product_kernel(
    grad_ptr, gb_ptr, A_ptr, seed_ptr, stride_gb, stride_A, T, K, p, salt,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    gb_mask = (rows < T)[:, None] & (ranks < R)[None, :]
    gb = tl.load(gb_ptr + rows[:, None] * stride_gb + ranks[None, :], mask=gb_mask, other=0.0)
    A_mask = (ranks < R)[:, None] & (columns < K)[None, :]
    A = tl.load(A_ptr + ranks[:, None] * stride_A + columns[None, :], mask=A_mask, other=0.0)
    product = tl.dot(gb, A, input_precision="ieee")
    mask = (rows < T)[:, None] & (columns < K)[None, :]
    ptrs = grad_ptr + rows[:, None] * K + columns[None, :]
    grad = tl.load(ptrs, mask=mask, other=0.0)
    stays = kept(seed_ptr, salt, rows[:, None], columns[None, :], K, p)
    value = grad.to(tl.float32) + tl.where(stays, product / (1.0 - p), 0.0)
    tl.store(ptrs, value.to(grad.dtype), mask=mask)


def dropout(x: Tensor, mask: Mask) -> Tensor:
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _dropout_kernel[(rows, triton.cdiv(width, _BLOCK))](
            x, out, mask.seed, x.stride(0), width, mask.p, mask.salt, BLOCK=_BLOCK
        )
    return out


def add_masked_product_(grad_x: Tensor, gb: Tensor, lora_A: Tensor, mask: Mask) -> Tensor:
    rows, width = grad_x.shape
    rank = gb.shape[1]
    if rows and rank:
        _add_masked_product_kernel[(triton.cdiv(rows, 64), triton.cdiv(width, 128))](
            grad_x, gb, lora_A, mask.seed, gb.stride(0), lora_A.stride(0), rows, width,
            mask.p, mask.salt,
            R=rank, BLOCK_R=max(triton.next_power_of_2(rank), 16), BLOCK_T=64, BLOCK_K=128,
        )  # fmt: skip
    return grad_x
