"""The weights of sibling projections in eight bits, on CUDA: from codes to e4m3 in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels import fp8
from halfbyte.kernels.fp8_triton import e4m3
from halfbyte.kernels.fp8_weight import factors_ as _dispatching_factors_
from halfbyte.kernels.fp8_weight import fill_ as _dispatching_fill_
from halfbyte.kernels.sizes import cdiv, next_power_of_2
from halfbyte.kernels.wide_triton import BELOW_COLUMNS, below, levels_on, right, right_rows

# Elements of a tile, and its least width.
_ELEMENTS, _WIDTH = 16384, 128
_LARGEST_BLOCK = 512
_LARGEST = tl.constexpr(fp8.LARGEST)
_TARGET, _LEAST = tl.constexpr(fp8.BALANCE[0]), tl.constexpr(fp8.BALANCE[1])


@triton.jit
def _fill_kernel(
    packed_ptr, absmax_ptr, nested_ptr, map_ptr, offset_ptr, levels_ptr, scale_ptr, values_ptr,
    stride, N, K,
    SIZE: tl.constexpr, IS_NESTED: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, EMULATES: tl.constexpr,
):  # fmt: skip
    # Blocks of the tile in the order of its rows; blocks never go over the end of a row.
    EACH: tl.constexpr = WIDTH // SIZE
    first_row, first_column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1) * WIDTH
    indices = tl.arange(0, ROWS * EACH)
    rows = first_row + indices // EACH
    starts = first_column + indices % EACH * SIZE
    mask = (rows < N) & (starts < K)
    blocks = (rows * K + starts) // SIZE
    if IS_NESTED:
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
    high = tl.load(levels_ptr + (pairs >> 4)) * absmax[:, None]
    low = tl.load(levels_ptr + (pairs & 15)) * absmax[:, None]
    values = tl.join(high, low).reshape(ROWS, WIDTH)
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, WIDTH)
    if IS_TRANSPOSED:
        scale = tl.load(scale_ptr + columns, mask=columns < K, other=1.0)[None, :]
    else:
        scale = tl.load(scale_ptr + rows, mask=rows < N, other=1.0)[:, None]
    values = e4m3(values / scale, EMULATES)
    if IS_TRANSPOSED:
        target = values_ptr + columns.to(tl.int64)[:, None] * stride + rows[None, :]
        tl.store(target, tl.trans(values), mask=(columns < K)[:, None] & (rows < N)[None, :])
    else:
        target = values_ptr + rows[:, None] * stride + columns[None, :]
        tl.store(target, values, mask=(rows < N)[:, None] & (columns < K)[None, :])


@triton.jit
def _right(
    pid, lora_B, scaling, out, count, first_column, scale_ptr,
    RANK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write rows of B; return the largest magnitude among them in units of their scales."""
    # The matrix is a border of its own: nothing before it.
    value = right(
        pid, lora_B, scaling, out, WIDTH, 0, count, first_column, RANK, WIDTH, BLOCK_WIDTH, ROWS
    )
    rows = pid * ROWS + tl.arange(0, ROWS)
    scale = tl.load(scale_ptr + rows, mask=rows < count, other=1.0)
    return tl.max(tl.max(tl.abs(value.to(tl.float32)), 1) / scale, 0)


@triton.jit
def _factors_kernel(
    A_ptr, B_ptr, largest_ptr, B_scale_ptr, A_scale_ptr, A0, B0, A1, B1, A2, B2,
    K, N0, N1, N2, scaling0, scaling1, scaling2,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    end0 = tl.cdiv(N0, ROWS)
    end1 = end0 + tl.cdiv(N1, ROWS)
    end2 = end1 + tl.cdiv(N2, ROWS)
    if pid < end0:
        largest = _right(pid, B0, scaling0, B_ptr, N0, 0, B_scale_ptr, R0, R, BLOCK_R, ROWS)
    elif pid < end1:
        B_ptr += N0 * R
        B_scale_ptr += N0
        largest = _right(pid - end0, B1, scaling1, B_ptr, N1, R0, B_scale_ptr, R1, R, BLOCK_R, ROWS)
    elif pid < end2:
        B_ptr += (N0 + N1) * R
        B_scale_ptr += N0 + N1
        largest = _right(
            pid - end1, B2, scaling2, B_ptr, N2, R0 + R1, B_scale_ptr, R2, R, BLOCK_R, ROWS
        )
    else:
        value = below(pid - end2, A0, A1, A2, A_ptr, K, K, R0, R1, R2, COLUMNS)
        offs = (pid - end2) % tl.cdiv(K, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
        scale = tl.load(A_scale_ptr + offs, mask=offs < K, other=1.0)
        largest = tl.max(tl.abs(value.to(tl.float32)) / scale, 0)
    tl.store(largest_ptr + pid, largest)


@triton.jit
def _balances_kernel(largest_ptr, balances_ptr, num_of_B, count, BLOCK: tl.constexpr):
    side = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    is_own = (offs < count) & ((offs < num_of_B) == (side == 0))
    largest = tl.max(tl.load(largest_ptr + offs, mask=is_own, other=0.0), 0)
    largest = tl.maximum(largest, _LEAST)
    wanted = tl.minimum(tl.rsqrt(largest / _TARGET), 1.0 / largest * _LARGEST)
    # Without its mantissa: the power of two below.
    balance = (wanted.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    tl.store(balances_ptr + side, balance)


def fill_(values, parts, scale, *, transposed) -> Tensor:
    if not all(_fits(part.weight) for part in parts):
        return _dispatching_fill_.__wrapped__(values, parts, scale, transposed=transposed)
    start = 0
    for part in parts:
        weight = part.weight
        N, K = weight.shape
        size = weight.block_size
        width = max(size, _WIDTH)
        rows = _ELEMENTS // width
        levels = levels_on(weight.quant_type, values.device)
        is_nested = weight.nested_absmax is not None
        nested = (weight.nested_absmax, weight.nested_map, weight.offset)
        own = values[:, start : start + N] if transposed else values[start : start + N]
        own_scale = scale if transposed else scale[start : start + N]
        start += N
        _fill_kernel[(cdiv(N, rows), cdiv(K, width))](
            weight.packed, weight.absmax, *(nested if is_nested else (levels,) * 3), levels,
            own_scale, own, values.stride(0), N, K,
            SIZE=size, IS_NESTED=is_nested, IS_TRANSPOSED=transposed, ROWS=rows, WIDTH=width,
            EMULATES=not values.is_cuda, enable_fp_fusion=False, num_warps=8,
        )  # fmt: skip
    return values


def _fits(weight) -> bool:
    """Whether the kernel can serve a weight: in four bits, of whole blocks a row."""
    if isinstance(weight, Tensor) or weight.block_size > _LARGEST_BLOCK:
        return False
    return weight.shape[1] % weight.block_size == 0


def factors_(lora_A, lora_B, balances, parts, scales) -> None:
    if len(parts) > 3:
        _dispatching_factors_.__wrapped__(lora_A, lora_B, balances, parts, scales)
        return
    ranks, inputs = lora_A.shape
    adapters, outputs, scalings, own_ranks = [], [], [], []
    for index in range(3):
        part = parts[index] if index < len(parts) else None
        has_adapter = part is not None and part.lora_A is not None
        adapters += (part.lora_A, part.lora_B) if has_adapter else (lora_A, lora_B)
        outputs.append(part.weight.shape[0] if part is not None else 0)
        scalings.append(part.scaling if has_adapter else 1.0)
        own_ranks.append(part.lora_A.shape[0] if has_adapter else 0)
    block_ranks = max(next_power_of_2(ranks), 16)
    rows = right_rows(block_ranks)
    num_of_B = sum(cdiv(count, rows) for count in outputs)
    programs = num_of_B + ranks * cdiv(inputs, BELOW_COLUMNS)
    largest = torch.empty(programs, dtype=torch.float32, device=lora_A.device)
    _factors_kernel[(programs,)](
        lora_A, lora_B, largest, *scales, *adapters, inputs, *outputs, *scalings,
        R0=own_ranks[0], R1=own_ranks[1], R2=own_ranks[2], R=ranks,
        BLOCK_R=block_ranks, ROWS=rows, COLUMNS=BELOW_COLUMNS,
    )  # fmt: skip
    _balances_kernel[(2,)](largest, balances, num_of_B, programs, BLOCK=next_power_of_2(programs))
