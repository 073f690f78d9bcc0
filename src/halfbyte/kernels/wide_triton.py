"""Fill the wide matrix of sibling projections, on CUDA."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels import codebooks
from halfbyte.kernels.wide import fill_weight_ as _dispatching_fill_weight_

# 64 blocks of 64 codes: 2 KiB of codes a program, 16 bytes a thread with 128 threads.
_BLOCKS = 64


@triton.jit
def _fill_weight_kernel(
    packed_ptr, absmax_ptr, nested_ptr, map_ptr, offset_ptr, levels_ptr, out_ptr,
    pitch, K, num_blocks,
    SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask = blocks < num_blocks
    if NESTED:
        code = tl.load(absmax_ptr + blocks, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested_ptr + blocks // 256, mask=mask, other=0.0)
        # Two roundings (fp fusion is off at launch), as bitsandbytes has them.
        absmax = tl.load(map_ptr + code) * scale + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + blocks, mask=mask, other=0.0)
    offs = tl.arange(0, SIZE // 2)
    pairs = tl.load(
        packed_ptr + blocks[:, None] * (SIZE // 2) + offs[None, :], mask=mask[:, None], other=0
    ).to(tl.int32)
    first = tl.load(levels_ptr + (pairs >> 4)) * absmax[:, None]
    second = tl.load(levels_ptr + (pairs & 15)) * absmax[:, None]
    element = out_ptr.dtype.element_ty
    values = tl.join(first.to(element), second.to(element)).reshape(BLOCKS, SIZE)
    start = blocks * SIZE
    target = out_ptr + (start // K) * pitch + start % K
    tl.store(target[:, None] + tl.arange(0, SIZE)[None, :], values, mask=mask[:, None])


@triton.jit
def _border_right_kernel(
    wide_ptr, lora_B_ptr, pitch, first_row, count, inputs, column, rank,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, width,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    own = columns - (column - inputs)
    is_own = (own >= 0) & (own < rank)
    mask = (rows < count)[:, None]
    value = tl.load(
        lora_B_ptr + rows[:, None] * rank + own[None, :], mask=mask & is_own[None, :], other=0.0
    )
    target = wide_ptr + (first_row + rows)[:, None] * pitch + inputs + columns[None, :]
    tl.store(target, value.to(wide_ptr.dtype.element_ty), mask=mask & (columns < width)[None, :])


@triton.jit
def _border_below_kernel(wide_ptr, lora_A_ptr, pitch, first_row, K, scaling, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    value = tl.load(lora_A_ptr + row * K + offs, mask=mask, other=0.0) * scaling
    target = wide_ptr + (first_row + row) * pitch + offs
    tl.store(target, value.to(wide_ptr.dtype.element_ty), mask=mask)


@functools.cache
def _levels(quant_type: str, device: torch.device) -> Tensor:
    """The sixteen levels, sent to the device once: a copy from the host would wait for it."""
    return codebooks.levels(quant_type, "cuda").to(device)


def fill_weight_(block, weight) -> Tensor:
    size, K = weight.block_size, block.shape[1]
    if K % size:
        # Blocks straddle rows: dequantize in one piece, then copy.
        return _dispatching_fill_weight_.__wrapped__(block, weight)
    num_blocks = weight.absmax.numel()
    nested = weight.nested_absmax is not None
    _fill_weight_kernel[(triton.cdiv(num_blocks, _BLOCKS * 64 // size),)](
        weight.packed, weight.absmax,
        weight.nested_absmax if nested else weight.absmax,
        weight.nested_map if nested else weight.absmax,
        weight.offset if nested else weight.absmax,
        _levels(weight.quant_type, block.device), block, block.stride(0), K, num_blocks,
        SIZE=size, NESTED=nested, BLOCKS=_BLOCKS * 64 // size, enable_fp_fusion=False,
    )  # fmt: skip
    return block


def fill_border_(wide, lora_A, lora_B, scaling, *, rows, column, inputs, outputs) -> Tensor:
    row, count = rows
    width = wide.shape[1] - inputs
    rank = 0 if lora_A is None else lora_A.shape[0]
    source = wide if lora_B is None else lora_B.detach()
    _border_right_kernel[(triton.cdiv(count, 64),)](
        wide, source, wide.stride(0), row, count, inputs, column, rank,
        WIDTH=max(triton.next_power_of_2(width), 16), ROWS=64, width=width,
    )  # fmt: skip
    if rank:
        _border_below_kernel[(rank, triton.cdiv(inputs, 1024))](
            wide, lora_A.detach(), wide.stride(0), outputs + column - inputs, inputs, scaling,
            BLOCK=1024,
        )  # fmt: skip
    return wide
