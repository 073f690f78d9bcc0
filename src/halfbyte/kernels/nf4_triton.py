"""Four-bit blocks on CUDA: one kernel in each direction.

A program takes a tile of whole blocks, or a part of one where blocks are longer than a tile: a
thread then reads 16 bytes of codes, and scales are read once a block. Offsets are 64-bit, because a
stack of experts may hold more than 2^31 elements.

Triton's interpreter (TRITON_INTERPRET=1) has no inline PTX; there `HAS_PTX` is off, tables are read
from memory and the reciprocal is the IEEE one. That changes no code of a bfloat16 weight and about
one in 5e7 of a float32 one (bitsandbytes is built with --use_fast_math, hence the approximation).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import functools

import torch
import triton
import triton.language as tl

from halfbyte.kernels import codebooks, nf4
from halfbyte.kernels.sizes import cdiv

# Elements of a program of two warps: 1 KiB of codes, 16 bytes a thread.
_TILE, _WARPS = 2048, 2
# Dequantizing writes four bytes for each that it reads, and a memory that changes from one to the
# other loses time. So it goes in turns: a few programs ask for the codes of the next 2 MiB at once,
# to be brought to the L2 cache, and those behind them find them there. In a trial, with words of
# eight codes a thread, turns took an H100 52.4 to 53.8 us for a weight of 14336 x 4096, and 55.1 to
# 55.5 without; the same bytes, moved without any work on them, took 54.3. As it is here it took
# 54.7 us beside 78.7 of bitsandbytes; before there were turns, in another call, 55.6 beside 79.8.
_LINES = 256
_FETCHERS, _TILES_A_TURN = 64, 2048
_NESTED_BLOCKS_AT_ONCE = 4
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_SMALLEST_NORMAL_BITS = tl.constexpr(0x00800000)
# An odd parabola through the thresholds of NF4: less than a half off their indices, 0 to 14.
_LINEAR, _SQUARE = tl.constexpr(11.8811), tl.constexpr(-3.7303)
# The index at 0, and 1.5 * 2^23: what that is added to is rounded to a whole number, in low bits.
_ROUNDER = tl.constexpr(7 + 12582912.0)


@triton.jit
def table_of_32(ptr, HAS_PTX: tl.constexpr):
    """Return a table of 32 floats for `entry`: one in each lane of a warp, or where it lies."""
    if HAS_PTX:
        table = tl.inline_asm_elementwise(
            """{
            .reg .u32 lane; .reg .u64 at;
            mov.u32 lane, %laneid; mad.wide.u32 at, lane, 4, $1; ld.global.nc.f32 $0, [at];
            }""",
            "=f,l", [ptr], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        table = ptr
    return table


@triton.jit
def entry(table, index, HAS_PTX: tl.constexpr):
    """Return the entries of `table_of_32` at the low five bits of `index`."""
    if HAS_PTX:
        value = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,f,r", [table, index],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        value = tl.load(table + (index & 31))
    return value


@triton.jit
def _larger(x, y):
    """Return the larger one, or NaN where there is one."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _inverse_absmax(x, HAS_PTX: tl.constexpr):
    """Return the largest magnitude of each row, and one over it; both 0 where it is denormal."""
    # As an integer a NaN is above all: it shows in absmax.
    largest = tl.reduce(tl.abs(x), 1, _larger).to(tl.int32, bitcast=True)
    absmax = tl.where(largest < _SMALLEST_NORMAL_BITS, 0, largest).to(tl.float32, bitcast=True)
    if HAS_PTX:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [absmax], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / absmax
    return absmax, tl.where(absmax > 0, inverse, 0.0)


@triton.jit
def _flush(x):
    """Return x with denormals as zeros, as bitsandbytes' multiplications treat them."""
    return tl.where(tl.abs(x) < _SMALLEST_NORMAL, 0.0, x)


@triton.jit
def _multiply(x, y, HAS_PTX: tl.constexpr):
    """Return x times y, denormals as zeros before and after."""
    if HAS_PTX:
        product = tl.inline_asm_elementwise(
            "mul.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        product = _flush(_flush(x) * y)
    return product


@triton.jit
def _rank(thresholds_ptr, x, IS_SMOOTH: tl.constexpr, HAS_PTX: tl.constexpr):
    """Return the count of the 15 thresholds below x in [-1, 1]; for NF4 in the low byte."""
    if IS_SMOOTH:
        # Less than a half off: all thresholds before the nearest index are below x, none after it
        # is, and the sign of one difference decides. NaN becomes some index of the table too.
        near = (_SQUARE * tl.abs(x) + _LINEAR) * x + _ROUNDER
        index = near.to(tl.int32, bitcast=True)
        threshold = entry(table_of_32(thresholds_ptr, HAS_PTX), index, HAS_PTX)
        rank = index + ((threshold - x).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    else:
        rank = tl.zeros(x.shape, dtype=tl.int32)
        for k in tl.static_range(15):
            rank += (x > tl.load(thresholds_ptr + k)).to(tl.int32)
    return rank


@triton.jit
def _quantize_kernel(
    weight_ptr, packed_ptr, absmax_ptr, thresholds_ptr, order_ptr, numel, num_bytes,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, IS_SORTED: tl.constexpr, HAS_PTX: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    blocks = first + tl.arange(0, BLOCKS)
    offs = blocks[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(weight_ptr + offs, mask=offs < numel, other=0.0).to(tl.float32)
    absmax, inverse = _inverse_absmax(x, HAS_PTX)
    tl.store(absmax_ptr + blocks, absmax, mask=blocks * SIZE < numel)
    x, inverse = tl.broadcast(x, inverse[:, None])
    rank = _rank(thresholds_ptr, _multiply(x, inverse, HAS_PTX), IS_SORTED, HAS_PTX)
    code = rank if IS_SORTED else tl.load(order_ptr + rank).to(tl.int32)
    high, low = tl.split(code.reshape(BLOCKS, SIZE // 2, 2))
    packed_offs = blocks[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    tl.store(packed_ptr + packed_offs, (high * 16 + low).to(tl.uint8), mask=packed_offs < num_bytes)


@triton.jit
def _fetch(ptr, first, num_bytes, LINES: tl.constexpr):
    """Ask for lines of 128 bytes to be brought to the L2 cache; nothing waits for them."""
    at = tl.minimum(first + tl.arange(0, LINES) * 128, num_bytes - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr + at],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _dequantize_kernel(
    packed_ptr, scales_ptr, codes_ptr, map_ptr, offset_ptr, levels_ptr, out_ptr, numel, num_bytes,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, IS_NESTED: tl.constexpr,
    FETCHERS: tl.constexpr, TILES: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    turn, own = tl.program_id(0) // (FETCHERS + TILES), tl.program_id(0) % (FETCHERS + TILES)
    if own < FETCHERS:
        _fetch(packed_ptr, (turn.to(tl.int64) * FETCHERS + own) * (LINES * 128), num_bytes, LINES)
    else:
        _dequantize(
            turn.to(tl.int64) * TILES + own - FETCHERS,
            packed_ptr, scales_ptr, codes_ptr, map_ptr, offset_ptr, levels_ptr, out_ptr,
            numel, num_bytes, SIZE, WIDTH, ROWS, IS_NESTED,
        )  # fmt: skip


@triton.jit
def _dequantize(
    tile, packed_ptr, scales_ptr, codes_ptr, map_ptr, offset_ptr, levels_ptr, out_ptr,
    numel, num_bytes,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, IS_NESTED: tl.constexpr,
):  # fmt: skip
    # A row is a block, or WIDTH elements of one; WIDTH divides SIZE.
    rows = tile * ROWS + tl.arange(0, ROWS)
    blocks = rows // (SIZE // WIDTH)
    mask = rows * WIDTH < numel
    if IS_NESTED:
        codes = tl.load(codes_ptr + blocks, mask=mask, other=0).to(tl.int32)
        scale = tl.load(scales_ptr + blocks // 256, mask=mask, other=0.0)
        # Two roundings, as bitsandbytes has them: fp fusion is off at launch.
        absmax = tl.load(map_ptr + codes) * scale + tl.load(offset_ptr)
    else:
        absmax = tl.load(scales_ptr + blocks, mask=mask, other=0.0)
    packed_offs = rows[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
    pairs = tl.load(packed_ptr + packed_offs, mask=packed_offs < num_bytes, other=0).to(tl.int32)
    # Sixteen floats: the gathers are served by the L1 cache.
    first = tl.load(levels_ptr + (pairs >> 4)) * absmax[:, None]
    second = tl.load(levels_ptr + (pairs & 15)) * absmax[:, None]
    element = out_ptr.dtype.element_ty
    values = tl.join(first.to(element), second.to(element)).reshape(ROWS, WIDTH)
    offs = rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out_ptr + offs, values, mask=offs < numel)


@triton.jit
def nearest(thresholds_ptr, x):
    """Return the count of thresholds below x: of 255, ascending."""
    index = tl.zeros(x.shape, dtype=tl.int32)
    for power in tl.static_range(8):
        step = 128 >> power
        index += tl.where(tl.load(thresholds_ptr + index + (step - 1)) < x, step, 0)
    return index


@triton.jit
def _quantize_blockwise_kernel(
    values_ptr, offset_ptr, codes_ptr, absmax_ptr, thresholds_ptr, numel,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_PTX: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offs = blocks[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(values_ptr + offs, mask=offs < numel, other=0.0)
    if HAS_OFFSET:
        x = tl.where(offs < numel, x - tl.load(offset_ptr), 0.0)
    absmax, inverse = _inverse_absmax(x, HAS_PTX)
    tl.store(absmax_ptr + blocks, absmax, mask=blocks * SIZE < numel)
    codes = nearest(thresholds_ptr, _flush(x) * inverse[:, None])
    codes = tl.where(absmax[:, None] > 0, codes, 0)
    tl.store(codes_ptr + offs, codes.to(tl.uint8), mask=offs < numel)


@functools.cache
def _table(name: str, quant_type: str, device: torch.device) -> torch.Tensor:
    """Return a table of codebooks on the device, sent once: a copy from the host would wait."""
    return getattr(codebooks, name)(quant_type, "cuda").to(device)


@functools.cache
def _thresholds(quant_type: str, device: torch.device) -> torch.Tensor:
    """Return the thresholds as a table of 32 on the device: none is below 0, none above 14."""
    table = torch.full((32,), torch.inf, device="cpu")
    table[:15] = codebooks.thresholds(quant_type, "cuda")
    table[-1] = -torch.inf  # index -1
    return table.to(device)  # whole before any stream reads it


@functools.cache
def dynamic_table(name: str, device: torch.device, *, is_signed: bool) -> torch.Tensor:
    """Return `codebooks.dynamic_map` or `dynamic_thresholds` on the device, sent once."""
    return getattr(codebooks, name)(signed=is_signed).to(device)


def quantize_4bit(weight, *, block_size=64, quant_type="nf4"):
    weight = weight.contiguous()
    numel, device = weight.numel(), weight.device
    packed = weight.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    absmax = weight.new_empty((cdiv(numel, block_size),), dtype=torch.float32)
    blocks = max(_TILE // block_size, 1)
    _quantize_kernel[(cdiv(numel, block_size * blocks),)](
        weight,
        packed,
        absmax,
        _thresholds(quant_type, device),
        _table("codes_by_rank", quant_type, device),
        numel,
        (numel + 1) // 2,
        SIZE=block_size,
        BLOCKS=blocks,
        IS_SORTED=quant_type == "nf4",
        HAS_PTX=weight.is_cuda,
        num_warps=_WARPS,
    )
    return packed, absmax


def dequantize_4bit(packed, absmax, *, shape, dtype, block_size=64, quant_type="nf4"):
    out = packed.new_empty(tuple(shape), dtype=dtype)
    _dequantize_into(out, packed, absmax, None, block_size, quant_type)
    return out


def dequantize_nested(
    packed,
    absmax_u8,
    nested_absmax,
    nested_map,
    offset,
    *,
    shape,
    dtype,
    block_size=64,
    quant_type="nf4",
):
    out = packed.new_empty(tuple(shape), dtype=dtype)
    nested = (absmax_u8.contiguous(), nested_map.contiguous(), offset)
    _dequantize_into(out, packed, nested_absmax, nested, block_size, quant_type)
    return out


def _dequantize_into(out, packed, scales, nested, block_size, quant_type):
    """Fill `out`; `nested` is the codes, map and offset of scales in eight bits, or None."""
    numel = out.numel()
    width = min(block_size, _TILE)
    rows = _TILE // width
    codes, nested_map, offset = nested or (scales, scales, scales)
    tiles = cdiv(numel, _TILE)
    fetchers = _fetchers(packed, tiles)
    grid = cdiv(tiles, _TILES_A_TURN) * (fetchers + _TILES_A_TURN) if fetchers else tiles
    _dequantize_kernel[(grid,)](
        packed.contiguous(),
        scales.contiguous(),
        codes,
        nested_map,
        offset,
        _table("levels", quant_type, packed.device),
        out,
        numel,
        packed.numel(),
        SIZE=block_size,
        WIDTH=width,
        ROWS=rows,
        IS_NESTED=nested is not None,
        FETCHERS=fetchers,
        TILES=_TILES_A_TURN,
        LINES=_LINES,
        enable_fp_fusion=False,
        num_warps=_WARPS,
    )


def _fetchers(packed, tiles):
    """Return how many programs of a turn fetch: none without inline PTX, or where codes are few."""
    return _FETCHERS if packed.is_cuda and tiles >= _TILES_A_TURN else 0


def quantize_blockwise(values, offset=None):
    values = values.contiguous()
    size, numel = nf4.NESTED_BLOCK_SIZE, values.numel()
    codes = torch.empty_like(values, dtype=torch.uint8)
    absmax = values.new_empty((cdiv(numel, size),))
    _quantize_blockwise_kernel[(cdiv(numel, size * _NESTED_BLOCKS_AT_ONCE),)](
        values,
        values if offset is None else offset,
        codes,
        absmax,
        dynamic_table("dynamic_thresholds", values.device, is_signed=True),
        numel,
        SIZE=size,
        BLOCKS=_NESTED_BLOCKS_AT_ONCE,
        HAS_OFFSET=offset is not None,
        HAS_PTX=values.is_cuda,
    )
    return codes, absmax
