"""Products of a few tokens with 4-bit weights on CUDA, through tensor cores.

Codes are operands of a tensor core without ever being rearranged: a unit of 16 bits holds four
codes, the first codes of 16 units side by side are one operand, the second codes the next, and so
on; x is put in that order once. The 16 units are 64 weights, a block, whose scale multiplies the
sum. All but the lookup is then little work, so several tokens take the time of one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.lookup_4bit import pair_lookup
from halfbyte.kernels.matvec_4bit_parts_triton import (
    before_product,
    norm_scale,
    scales,
    sibling_of,
    weights_of,
)
from halfbyte.kernels.rms_norm import Norm

_PREPARE_PROGRAMS = 16
_MAX_BLOCK = 16384
_MAX_TOKENS_A_TILE = 32
# What the largest element of an x becomes at most: float16 holds all of bf16 below it.
_LARGEST = 2.0**15


@triton.jit
def _prepare_kernel(
    x, norm, eps, lora_A, prepared, sizes, xa, num_ranks,
    K: tl.constexpr, WIDTH: tl.constexpr, BEFORE: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr, SHARE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (p, t) makes element p of `f(x_t) A^T` and SHARE elements of f(x_t).

    These become float16 of a size that it holds, `f(x_t) / size * LARGEST / 2`, in the order of the
    product: of 64, the four elements of unit u are at u, 16 + u, 32 + u and 48 + u.
    """
    pid, token = tl.program_id(0), tl.program_id(1)
    x += token * WIDTH
    scale = 1.0
    if BEFORE == "norm":
        scale = norm_scale(x, eps, K, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tl.load(lora_A + pid * K + at, mask=(at < K) & (pid < num_ranks), other=0.0)
        value = before_product(x, norm, scale, at, at < K, K, BEFORE)
        total += value * a.to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    tl.store(xa + token * num_ranks + pid, tl.sum(total, 0), mask=pid < num_ranks)
    # The power of two at or below the largest: dividing by it rounds nothing.
    size = tl.maximum(tl.max(largest, 0), 1e-30)
    size = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(sizes + token, size, mask=pid == 0)
    at = pid * SHARE + tl.arange(0, BLOCK_S)
    mask = (at < K) & (at < (pid + 1) * SHARE)
    value = before_product(x, norm, scale, at, mask, K, BEFORE) * (LARGEST / 2 / size)
    place = at // 64 * 64 + at % 4 * 16 + at % 64 // 4
    tl.store(prepared + token * K + place, value.to(tl.float16), mask=mask)


@triton.jit
def _level(codes, levels, i: tl.constexpr):
    shift: tl.constexpr = 4 * (i ^ 1)
    return tl.load(levels + ((codes >> shift) & 15)).to(tl.float16)


@triton.jit
def _operands(
    codes, levels, PICK0: tl.constexpr, PICK1: tl.constexpr, EVEN: tl.constexpr, ODD: tl.constexpr
):
    """Return the first to fourth values of each unit of codes, float16.

    Every step has one result, made of one tensor: so Triton takes the codes to where a tensor core
    wants its operands, and makes the values there.
    """
    if PICK0 == "":
        v0, v1 = _level(codes, levels, 0), _level(codes, levels, 1)
        v2, v3 = _level(codes, levels, 2), _level(codes, levels, 3)
    else:
        low = tl.inline_asm_elementwise(
            PICK0, "=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=2
        )
        high = tl.inline_asm_elementwise(
            PICK1, "=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=2
        )
        v0 = tl.inline_asm_elementwise(
            EVEN, "=r,r,r", [low], dtype=tl.float16, is_pure=True, pack=2
        )
        v1 = tl.inline_asm_elementwise(ODD, "=r,r,r", [low], dtype=tl.float16, is_pure=True, pack=2)
        v2 = tl.inline_asm_elementwise(
            EVEN, "=r,r,r", [high], dtype=tl.float16, is_pure=True, pack=2
        )
        v3 = tl.inline_asm_elementwise(
            ODD, "=r,r,r", [high], dtype=tl.float16, is_pure=True, pack=2
        )
    return v0, v1, v2, v3


@triton.jit
def _fetch(at, bytes, AHEAD: tl.constexpr):
    """Have the first AHEAD bytes from each of these addresses brought into the L2 cache."""
    for start in tl.static_range(0, AHEAD, 128):
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $2, $3; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r,r", [at + start, start, bytes], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _tokens_kernel(
    x, sizes, xa, lora_B, bias, residual, out, levels,
    packed0, absmax0, nested0, map0, offset0,
    packed1, absmax1, nested1, map1, offset1,
    packed2, absmax2, nested2, map2, offset2,
    N0, N1, N2, T, num_ranks,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    K: tl.constexpr, SIZE: tl.constexpr, NESTED: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
    PICK0: tl.constexpr, PICK1: tl.constexpr, EVEN: tl.constexpr, ODD: tl.constexpr,
    SCALE: tl.constexpr, ZERO: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a sibling for BLOCK_T tokens; each of PARTS warps takes a part of the inputs."""
    sibling, tile, first, N, packed, absmax, nested, nested_map, offset = sibling_of(
        tl.program_id(0), N0, N1, N2,
        packed0, absmax0, nested0, map0, offset0,
        packed1, absmax1, nested1, map1, offset1,
        packed2, absmax2, nested2, map2, offset2, ROWS,
    )  # fmt: skip
    # Rows behind the last one repeat it.
    row = tl.minimum(tile * ROWS + tl.arange(0, ROWS), N - 1)[None, :]
    mean = 0.0
    if NESTED:
        mean = tl.load(offset)
    BLOCKS: tl.constexpr = K // 64
    LENGTH: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    part = tl.arange(0, PARTS)[:, None] * LENGTH
    if AHEAD > 0:
        _fetch(
            (packed + row * (K // 4) + part * 16).to(tl.int64),
            tl.minimum(LENGTH, BLOCKS - part) * 32 + row * 0, AHEAD,
        )  # fmt: skip
    unit = tl.arange(0, 16)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    minus_zero = tl.full([PARTS, ROWS, 16], -ZERO, tl.float16)
    acc = tl.zeros([PARTS, ROWS, BLOCK_T], tl.float32)
    for step in tl.range(0, LENGTH, num_stages=STAGES):
        block = part + step
        at = packed + (row * (K // 4) + block * 16)[:, :, None] + unit[None, None, :]
        x_at = x + (block * 64)[:, :, None] + unit[None, :, None] + token[None, None, :] * K
        if BLOCKS % PARTS == 0:
            is_block = block >= 0
            codes = tl.load(at)
        else:
            is_block = block < BLOCKS
            codes = tl.load(at, mask=is_block[:, :, None], other=0)
        is_x = is_block[:, :, None] & (token < T)[None, None, :]
        x0 = tl.load(x_at, mask=is_x, other=0.0)
        x1 = tl.load(x_at + 16, mask=is_x, other=0.0)
        x2 = tl.load(x_at + 32, mask=is_x, other=0.0)
        x3 = tl.load(x_at + 48, mask=is_x, other=0.0)
        v0, v1, v2, v3 = _operands(codes, levels, PICK0, PICK1, EVEN, ODD)
        y = tl.dot(v0, x0)
        y = tl.dot(v1, x1, y)
        y = tl.dot(v2, x2, y)
        y = tl.dot(v3, x3, y)
        if ZERO != 0:
            y = tl.dot(minus_zero, x0, y)
            y = tl.dot(minus_zero, x1, y)
            y = tl.dot(minus_zero, x2, y)
            y = tl.dot(minus_zero, x3, y)
        scale = scales(
            absmax, nested, nested_map, mean, row * (K // SIZE) + block // (SIZE // 64),
            is_block & (row >= 0), NESTED,
        )  # fmt: skip
        acc += y * scale[:, :, None]
    row = tile * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    is_token = token < T
    at = first + row
    y = tl.sum(acc, 0) * (tl.load(sizes + token, mask=is_token, other=0.0) * SCALE)[None, :]
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        is_rank = ranks < RANK
        b = tl.load(
            lora_B + at[:, None] * RANK + ranks[None, :],
            mask=is_row[:, None] & is_rank[None, :], other=0.0,
        )  # fmt: skip
        low = tl.load(
            xa + token[None, :] * num_ranks + sibling * RANK + ranks[:, None],
            mask=is_token[None, :] & is_rank[:, None], other=0.0,
        )  # fmt: skip
        y = tl.dot(b, low.to(b.dtype), y)
    if HAS_BIAS:
        y += tl.load(bias + at, mask=is_row, other=0.0).to(tl.float32)[:, None]
    target = token[None, :] * (N0 + N1 + N2) + at[:, None]
    mask = is_row[:, None] & is_token[None, :]
    if HAS_RESIDUAL:
        y += tl.load(residual + target, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + target, y.to(out.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """What a program of the product takes: rows, warps along the inputs, and how far ahead."""

    rows: int = 32
    parts: int = 4
    stages: int = 4
    ahead: int = 256


def tile_for(outputs: int, tokens: int) -> Tile:
    """Return a tile of which there are a few programs for each multiprocessor.

    What is in flight fits into 99 KiB of shared memory, which is what consumer cards have.
    """
    if outputs > 16384:
        return Tile(rows=64)
    return Tile(rows=16, parts=8, stages=4 if tokens <= 16 else 3)


def several_tokens(x, group, before, residual) -> Tensor:
    """Return `y`, `[T, N]`: see `kernels.matvec_4bit`."""
    tile = tile_for(sum(weight.shape[0] for weight in group.weights), x.shape[0])
    return multiply(*prepare(x, group, before), group, residual, x.dtype, tile)


def prepare(x, group, before) -> tuple[Tensor, Tensor, Tensor]:
    """Return f(x) as the product reads it, its sizes, and `f(x) A^T`."""
    T, K = x.shape[0], group.weights[0].shape[1]
    ranks = 0 if group.lora_A is None else group.lora_A.shape[0]
    prepared = torch.empty(T, K, dtype=torch.float16, device=x.device)
    sizes = torch.empty(T, dtype=torch.float32, device=x.device)
    xa = torch.empty(T, max(ranks, 1), dtype=torch.float32, device=x.device)
    is_norm = isinstance(before, Norm)
    block = min(triton.next_power_of_2(K), _MAX_BLOCK)
    programs = max(ranks, _PREPARE_PROGRAMS)
    share = triton.cdiv(K, programs)
    _prepare_kernel[(programs, T)](
        x, before.weight if is_norm else xa, before.eps if is_norm else 0.0,
        x if group.lora_A is None else group.lora_A, prepared, sizes, xa, ranks,
        K=K, WIDTH=x.shape[1], LARGEST=_LARGEST,
        BEFORE="norm" if is_norm else "" if before is None else before.activation,
        BLOCK=block, SHARE=share, BLOCK_S=triton.next_power_of_2(share),
        num_warps=max(min(block // 512, 16), 1),
    )  # fmt: skip
    return prepared, sizes, xa


def multiply(prepared, sizes, xa, group, residual, dtype, tile) -> Tensor:
    """Return what is left to do after `prepare`, `[T, N]`."""
    first = group.weights[0]
    how = pair_lookup(first.quant_type, prepared.device)
    pointers, outputs = weights_of(group, prepared, torch.int16)
    T, N = prepared.shape[0], sum(outputs)
    ranks = 0 if group.lora_A is None else group.lora_A.shape[0]
    rank = ranks // len(group.weights)
    block_t = max(min(triton.next_power_of_2(T), _MAX_TOKENS_A_TILE), 8)
    out = torch.empty(T, N, dtype=dtype, device=prepared.device)
    tiles = sum(triton.cdiv(n, tile.rows) for n in outputs)
    _tokens_kernel[(tiles, triton.cdiv(T, block_t))](
        prepared, sizes, xa,
        *(out if t is None else t for t in (group.lora_B, group.bias, residual)),
        out, how.levels, *pointers, *outputs, T, ranks,
        RANK=rank, BLOCK_R=max(triton.next_power_of_2(max(rank, 1)), 16),
        HAS_BIAS=group.bias is not None, HAS_RESIDUAL=residual is not None,
        K=first.shape[1], SIZE=first.block_size, NESTED=first.nested_absmax is not None,
        PARTS=tile.parts, ROWS=tile.rows, BLOCK_T=block_t, STAGES=tile.stages,
        PICK0=how.pick[0], PICK1=how.pick[1], EVEN=how.join[0], ODD=how.join[1],
        SCALE=how.scale * 2 / _LARGEST, ZERO=how.zero, AHEAD=tile.ahead if how.pick[0] else 0,
        num_warps=tile.parts,
    )  # fmt: skip
    return out
