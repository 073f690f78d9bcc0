"""The wide matrix of sibling projections, on CUDA, in one launch.

The host is what binds short steps: seven projections, each a dequantize and two borders, twice a
step, would be 1,344 launches of an 8B model. One launch a group makes them 256.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels import codebooks
from halfbyte.kernels.nf4_triton import entry, table_of_32
from halfbyte.kernels.sizes import cdiv, next_power_of_2
from halfbyte.kernels.wide import assemble_ as _dispatching_assemble_

# Elements of a program of two warps: 32 blocks of 64 codes.
_ELEMENTS, _WARPS = 2048, 2
# Rows of B that a program writes at most, and their elements: with more, the registers that they
# take would leave all programs of the kernel fewer places on a multiprocessor.
_RIGHT_ROWS, _RIGHT_ELEMENTS = 64, 4096
BELOW_COLUMNS = 1024
"""Columns of A that a program writes."""


@triton.jit
def _fill(
    pid, packed, absmax_ptr, nested, nested_map, offset, levels, out, pitch, K, num_blocks,
    SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr, HAS_PTX: tl.constexpr,
):  # fmt: skip
    first_block = pid.to(tl.int64) * BLOCKS
    own = tl.arange(0, BLOCKS)
    mask = own < num_blocks - pid * BLOCKS
    if NESTED:
        code = tl.load(absmax_ptr + first_block + own, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested + pid * BLOCKS // 256)  # of all, for BLOCKS divides 256
        # Two roundings (fp fusion is off at launch), as bitsandbytes has them.
        absmax = tl.load(nested_map + code) * scale + tl.load(offset)
    else:
        absmax = tl.load(absmax_ptr + first_block + own, mask=mask, other=0.0)
    absmax = absmax[:, None, None]
    # Four bytes of codes a thread and access: what it then writes are 16 bytes.
    inner = tl.arange(0, SIZE // 8)[:, None] * 4 + tl.arange(0, 4)[None, :]
    pairs = tl.load(
        packed + first_block * (SIZE // 2) + own[:, None, None] * (SIZE // 2) + inner[None, :, :],
        mask=mask[:, None, None], other=0, eviction_policy="evict_first",
    ).to(tl.int32)  # fmt: skip
    table = table_of_32(levels, HAS_PTX)
    first = entry(table, pairs >> 4, HAS_PTX) * absmax
    second = entry(table, pairs, HAS_PTX) * absmax
    element = out.dtype.element_ty
    values = tl.join(first.to(element), second.to(element)).reshape(BLOCKS, SIZE)
    per_row = K // SIZE
    block = pid * BLOCKS + own
    row = block // per_row
    target = out + row.to(tl.int64) * pitch + (block - row * per_row) * SIZE
    tl.store(target[:, None] + tl.arange(0, SIZE)[None, :], values, mask=mask[:, None])


@triton.jit
def right(
    pid, lora_B, scaling, out, pitch, K, count, first_column,
    RANK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    own = columns - first_column
    mask = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    is_own = mask & ((own >= 0) & (own < RANK))[None, :]
    value = tl.load(lora_B + rows[:, None] * RANK + own[None, :], mask=is_own, other=0.0) * scaling
    target = out + rows[:, None] * pitch + K + columns[None, :]
    value = value.to(out.dtype.element_ty)
    tl.store(target, value, mask=mask)
    return value


@triton.jit
def below(
    pid, A0, A1, A2, out, pitch, K,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(K, COLUMNS)
    row = (pid // num_columns).to(tl.int64)
    offs = (pid % num_columns) * COLUMNS + tl.arange(0, COLUMNS)
    mask = offs < K
    value = tl.load(A0 + row * K + offs, mask=mask & (row < R0), other=0.0)
    inner = row - R0
    value += tl.load(A1 + inner * K + offs, mask=mask & (inner >= 0) & (inner < R1), other=0.0)
    inner = row - R0 - R1
    value += tl.load(A2 + inner * K + offs, mask=mask & (inner >= 0) & (inner < R2), other=0.0)
    value = value.to(out.dtype.element_ty)
    tl.store(out + row * pitch + offs, value, mask=mask)
    return value


@triton.jit
def _assemble_kernel(
    packed0, absmax0, nested0, map0, offset0, A0, B0,
    packed1, absmax1, nested1, map1, offset1, A1, B1,
    packed2, absmax2, nested2, map2, offset2, A2, B2,
    levels, out, pitch, K, N0, N1, N2, scaling0, scaling1, scaling2,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FILLS: tl.constexpr, HAS_PTX: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    per_row = K // SIZE if FILLS else 0
    fill0 = tl.cdiv(N0 * per_row, BLOCKS)
    fill1 = fill0 + tl.cdiv(N1 * per_row, BLOCKS)
    fill2 = fill1 + tl.cdiv(N2 * per_row, BLOCKS)
    out1 = out + tl.cast(pitch, tl.int64) * N0
    out2 = out1 + tl.cast(pitch, tl.int64) * N1
    if pid < fill0:
        _fill(
            pid, packed0, absmax0, nested0, map0, offset0, levels, out, pitch, K, N0 * per_row,
            SIZE, NESTED, BLOCKS, HAS_PTX,
        )  # fmt: skip
    elif pid < fill1:
        _fill(
            pid - fill0, packed1, absmax1, nested1, map1, offset1, levels, out1, pitch, K,
            N1 * per_row, SIZE, NESTED, BLOCKS, HAS_PTX,
        )  # fmt: skip
    elif pid < fill2:
        _fill(
            pid - fill1, packed2, absmax2, nested2, map2, offset2, levels, out2, pitch, K,
            N2 * per_row, SIZE, NESTED, BLOCKS, HAS_PTX,
        )  # fmt: skip
    elif WIDTH > 0:
        right0 = fill2 + tl.cdiv(N0, ROWS)
        right1 = right0 + tl.cdiv(N1, ROWS)
        right2 = right1 + tl.cdiv(N2, ROWS)
        if pid < right0:
            right(pid - fill2, B0, scaling0, out, pitch, K, N0, 0, R0, WIDTH, BLOCK_WIDTH, ROWS)
        elif pid < right1:
            right(pid - right0, B1, scaling1, out1, pitch, K, N1, R0, R1, WIDTH, BLOCK_WIDTH, ROWS)
        elif pid < right2:
            right(
                pid - right1, B2, scaling2, out2, pitch, K, N2, R0 + R1, R2, WIDTH, BLOCK_WIDTH,
                ROWS,
            )  # fmt: skip
        else:
            rest = out2 + tl.cast(pitch, tl.int64) * N2
            below(pid - right2, A0, A1, A2, rest, pitch, K, R0, R1, R2, COLUMNS)


@functools.cache
def levels_on(quant_type: str, device: torch.device) -> Tensor:
    """The sixteen levels, twice, sent to the device once: a copy from the host would wait."""
    return codebooks.levels(quant_type, "cuda").repeat(2).to(device)


def right_rows(block_width: int) -> int:
    """Return how many rows of B, so wide, a program writes."""
    return max(min(_RIGHT_ROWS, _RIGHT_ELEMENTS // block_width), 1)


def _fits(parts) -> bool:
    """Whether one launch can serve the parts: up to three 4-bit weights of one kind, whole rows."""
    first = parts[0].weight
    if len(parts) > 3 or any(isinstance(part.weight, Tensor) for part in parts):
        return False
    kind = (first.block_size, first.quant_type, first.nested_absmax is None)
    return first.shape[1] % first.block_size == 0 and all(
        (p.weight.block_size, p.weight.quant_type, p.weight.nested_absmax is None) == kind
        for p in parts
    )


def _pointers(part, absent) -> list[Tensor]:
    weight = part.weight
    nested = weight.nested_absmax is not None
    scales = (weight.nested_absmax, weight.nested_map, weight.offset) if nested else (absent,) * 3
    adapter = (part.lora_A, part.lora_B) if part.lora_A is not None else (absent, absent)
    return [weight.packed, weight.absmax, *scales, *adapter]


def assemble_(wide, parts, *, only_border=False) -> Tensor:
    if not _fits(parts):
        return _dispatching_assemble_.__wrapped__(wide, parts, only_border=only_border)
    first = parts[0].weight
    levels = levels_on(first.quant_type, wide.device)
    pointers, outputs, scalings, ranks = [], [], [], []
    for part in parts:
        pointers += _pointers(part, levels)
        outputs.append(part.weight.shape[0])
        scalings.append(part.scaling)
        ranks.append(0 if part.lora_A is None else part.lora_A.shape[0])
    for _ in range(3 - len(parts)):
        pointers += _pointers(parts[0], levels)
        outputs.append(0)
        scalings.append(1.0)
        ranks.append(0)
    K = first.shape[1]
    width = wide.shape[1] - K
    block_width = max(next_power_of_2(width), 16)
    rows = right_rows(block_width)
    blocks = max(_ELEMENTS // first.block_size, 1)
    per_row = 0 if only_border else K // first.block_size
    grid = sum(cdiv(n * per_row, blocks) for n in outputs)
    if width:
        grid += sum(cdiv(n, rows) for n in outputs)
        grid += width * cdiv(K, BELOW_COLUMNS)
    if not grid:
        return wide
    _assemble_kernel[(grid,)](
        *pointers, levels, wide, wide.stride(0), K, *outputs, *scalings,
        R0=ranks[0], R1=ranks[1], R2=ranks[2],
        WIDTH=width, BLOCK_WIDTH=block_width,
        SIZE=first.block_size, NESTED=first.nested_absmax is not None, BLOCKS=blocks,
        ROWS=rows, COLUMNS=BELOW_COLUMNS, FILLS=not only_border,
        HAS_PTX=wide.is_cuda, enable_fp_fusion=False, num_warps=_WARPS,
    )  # fmt: skip
    return wide
