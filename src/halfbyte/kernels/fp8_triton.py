"""Rows of e4m3 numbers, on CUDA: what is made anew in every step, in one pass each.

Triton's interpreter (TRITON_INTERPRET=1) casts to e4m3 wrongly where rounding carries into the
exponent; there `EMULATES` rounds before.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels import fp8
from halfbyte.kernels.fp8 import Rows, border_columns
from halfbyte.kernels.sizes import cdiv, next_power_of_2

# Longer rows are read twice, the second time from a cache: they would not fit into registers. On an
# H100, of 8,192 rows, 14,336 columns took 125 us whole and 130 in blocks of 4,096; 28,672 took 291
# whole, 265 in blocks of 8,192, 282 of 4,096.
_WHOLE = 16384
_BLOCK = 8192
# Elements of a thread.
_WHOLE_THREAD, _BLOCK_THREAD = 32, 16
# Rows of a factor that a program splits at most, and elements of its border.
_SPLIT_ROWS, _SPLIT_ELEMENTS = 32, 8192
_LARGEST = tl.constexpr(fp8.LARGEST)
_TINY = tl.constexpr(fp8.TINY)
# 1.5 * 2^23 * 2^-9: a float32 that it is added to is rounded to a multiple of 2^-9.
_ROUNDER = tl.constexpr(24576.0)


@triton.jit
def e4m3(x, EMULATES: tl.constexpr):
    """Return x, of magnitude 448 at most, as the nearest e4m3 number, ties to even."""
    if EMULATES:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        normal = bits.to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 0.015625, (x + _ROUNDER) - _ROUNDER, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def _e4m3_where(condition, x, EMULATES: tl.constexpr):
    """Return x as e4m3 numbers, zeros where the condition does not hold.

    They are chosen behind the conversion. ptxas 12.8 (Triton 3.6 and 3.7) may forget half a
    register when it joins two equal pairs of converted numbers, as all zeros are: the padding of
    borders held what the register had held before, in some programs NaN.
    """
    byte = e4m3(x, EMULATES).to(tl.uint8, bitcast=True)
    return tl.where(condition, byte, 0).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _quantize_rows_kernel(
    x_ptr, border_ptr, values_ptr, scale_ptr, balance_ptr,
    stride_x, stride_border, stride_values, K,
    R: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, HAS_BORDER: tl.constexpr,
    IS_WHOLE: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, EMULATES: tl.constexpr,
):  # fmt: skip
    if IS_ALIGNED:
        stride_x = stride_x // 8 * 8  # says that rows start at 16 bytes
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    values_ptr += row * stride_values
    offs = tl.arange(0, BLOCK)
    # All reads begin before anything waits for one of them.
    if P > 0:
        columns = tl.arange(0, BLOCK_P)
        term = columns // R
        border = tl.zeros((BLOCK_P,), tl.float32)
        if HAS_BORDER:
            own_ptr = border_ptr + row * stride_border + columns % R
            own = tl.load(own_ptr, mask=term < 3, other=0.0).to(tl.float32)
            border = own / tl.load(balance_ptr)
    x = tl.load(x_ptr + offs, mask=offs < K, other=0.0).to(tl.float32)
    sums = tl.abs(x)
    if not IS_WHOLE:
        for start in range(BLOCK, K, BLOCK):
            inner = start + offs
            part = tl.load(x_ptr + inner, mask=inner < K, other=0.0).to(tl.float32)
            sums = tl.maximum(sums, tl.abs(part))
    largest = tl.maximum(tl.max(sums, 0), _TINY)
    if P > 0:
        largest = tl.maximum(largest, tl.max(tl.abs(border), 0))
    inverse = 1.0 / largest * _LARGEST
    tl.store(scale_ptr + row, largest / _LARGEST)
    tl.store(values_ptr + offs, e4m3(x * inverse, EMULATES), mask=offs < K)
    if not IS_WHOLE:
        for start in range(BLOCK, K, BLOCK):
            inner = start + offs
            part = tl.load(x_ptr + inner, mask=inner < K, other=0.0).to(tl.float32)
            tl.store(values_ptr + inner, e4m3(part * inverse, EMULATES), mask=inner < K)
    if P > 0:
        border = border * inverse
        rest = border - e4m3(border, EMULATES).to(tl.float32)
        border = tl.where(term == 1, rest, border)
        border = _e4m3_where((term < 3) & HAS_BORDER, border, EMULATES)
        tl.store(values_ptr + K + columns, border, mask=columns < P)


@triton.jit
def _split(
    pid, values_ptr, factor_ptr, scale_ptr, balance_ptr,
    stride_values, stride_row, stride_rank, K, count,
    R: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
    EMULATES: tl.constexpr,
):  # fmt: skip
    rows = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_P)
    term = columns // R
    row_mask = rows < count
    factor = tl.load(
        factor_ptr + rows[:, None] * stride_row + (columns % R)[None, :] * stride_rank,
        mask=row_mask[:, None] & (term < 3)[None, :], other=0.0,
    )  # fmt: skip
    scale = tl.load(scale_ptr + rows, mask=row_mask, other=1.0)
    border = factor.to(tl.float32) / scale[:, None] * tl.load(balance_ptr)
    rest = border - e4m3(border, EMULATES).to(tl.float32)
    border = tl.where((term == 2)[None, :], rest, border)
    border = _e4m3_where((term < 3)[None, :], border, EMULATES)
    target = values_ptr + rows[:, None] * stride_values + K + columns[None, :]
    tl.store(target, border, mask=row_mask[:, None] & (columns < P)[None, :])


@triton.jit
def _split_kernel(
    values0, factor0, scale0, stride_values0, stride_row0, stride_rank0, K0, count0,
    values1, factor1, scale1, stride_values1, stride_row1, stride_rank1, K1, count1, balance_ptr,
    R: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
    EMULATES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    end0 = tl.cdiv(count0, ROWS)
    if pid < end0:
        _split(
            pid, values0, factor0, scale0, balance_ptr,
            stride_values0, stride_row0, stride_rank0, K0, count0, R, P, BLOCK_P, ROWS, EMULATES,
        )  # fmt: skip
    else:
        _split(
            pid - end0, values1, factor1, scale1, balance_ptr + 1,
            stride_values1, stride_row1, stride_rank1, K1, count1, R, P, BLOCK_P, ROWS, EMULATES,
        )  # fmt: skip


def quantize_rows(x: Tensor, border: Tensor, balance: Tensor | None) -> Rows:
    (T, features), ranks = x.shape, border.shape[1]
    columns = border_columns(ranks)
    values = torch.empty(T, features + columns, dtype=fp8.DTYPE, device=x.device)
    scale = torch.empty(T, dtype=torch.float32, device=x.device)
    if T:
        is_whole = features <= _WHOLE
        block = next_power_of_2(features) if is_whole else _BLOCK
        warps = block // (_WHOLE_THREAD if is_whole else _BLOCK_THREAD) // 32
        _quantize_rows_kernel[(T,)](
            x, border, values, scale, scale if balance is None else balance,
            x.stride(0), border.stride(0), values.stride(0), features,
            R=max(ranks, 1), P=columns, BLOCK_P=next_power_of_2(max(columns, 1)),
            HAS_BORDER=balance is not None, IS_WHOLE=is_whole, IS_ALIGNED=x.stride(0) % 8 == 0,
            BLOCK=block, EMULATES=not x.is_cuda, num_warps=max(warps, 1),
        )  # fmt: skip
    return Rows(values, scale)


def split_borders_(balances: Tensor, matrices: Sequence[Rows], factors: Sequence[Tensor]) -> None:
    ranks = factors[0].shape[1]
    columns = border_columns(ranks)
    block = next_power_of_2(columns)
    rows = max(min(_SPLIT_ROWS, _SPLIT_ELEMENTS // block), 1)
    arguments, programs = [], 0
    for (values, scale), factor in zip(matrices, factors, strict=True):
        features, count = values.shape[1] - columns, len(factor)
        arguments += [values, factor, scale, values.stride(0), *factor.stride(), features, count]
        programs += cdiv(count, rows)
    _split_kernel[(programs,)](
        *(arguments if len(matrices) == 2 else arguments * 2), balances, R=ranks, P=columns,
        BLOCK_P=block, ROWS=rows, EMULATES=not balances.is_cuda,
    )  # fmt: skip
