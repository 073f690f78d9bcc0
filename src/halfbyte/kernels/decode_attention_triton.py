"""Attention of one new token a sequence on CUDA: the past is cut into parts that run side by side.

Each part has its largest score and sum; their weighted sum is another launch, or the beginning of
the product that reads it (Flash-Decoding, Dao et al. 2023). Program 0 of a key-value head turns,
stores and attends to the new token itself.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.decode_attention import Join

_PROGRAMS = 256
# Tokens at a time, and the bytes of their keys: in flight they take half of the 99 KiB of shared
# memory that a multiprocessor has on consumer cards, so wide heads take fewer tokens.
_MAX_BLOCK, _MIN_BLOCK, _BLOCK_BYTES = 64, 16, 16384
_MAX_PARTS = 64


@triton.jit
def _turned(at, cos, sin, mask, D: tl.constexpr):
    """Return heads `[.., D]` at these addresses, turned and rounded as in the cache."""
    d = tl.arange(0, D)
    half: tl.constexpr = D // 2
    other = tl.where(d < half, d + half, d - half)
    x = tl.load(at + d[None, :], mask=mask, other=0.0)
    y = tl.load(at + other[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.where((d < half)[None, :], -y, y)
    return (x.to(tl.float32) * cos[None, :] + y * sin[None, :]).to(x.dtype)


@triton.jit
def _attend_kernel(
    qkv, cos_table, sin_table, positions, keys, values, partial, largest, sums, scale, L, num_parts,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, kv, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    GROUP: tl.constexpr = N // M
    d = tl.arange(0, D)
    g = tl.arange(0, BLOCK_G)
    is_head = g < GROUP
    position = tl.load(positions + b)
    cos = tl.load(cos_table + position * D + d).to(tl.float32)
    sin = tl.load(sin_table + position * D + d).to(tl.float32)
    row = qkv + b * (N + 2 * M) * D
    at = row + (kv * GROUP + g)[:, None] * D
    query = _turned(at, cos, sin, is_head[:, None], D)
    cache = (b * M + kv) * L * D
    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, D], tl.float32)
    if part == 0:
        one = tl.arange(0, 1)
        key = _turned(row + (N + kv + one)[:, None] * D, cos, sin, (one == 0)[:, None], D)
        value = tl.load(row + (N + M + kv + one)[:, None] * D + d[None, :])
        place = cache + (position + one)[:, None] * D + d[None, :]
        tl.store(keys + place, key)
        tl.store(values + place, value)
        most = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
        total += 1.0
        acc += value.to(tl.float32)
    size = tl.cdiv(tl.cdiv(position, num_parts), BLOCK) * BLOCK
    end = tl.minimum((part + 1) * size, position)
    for start in tl.range(part * size, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        is_past = n < end
        place = cache + n[:, None] * D + d[None, :]
        key = tl.load(keys + place, mask=is_past[:, None], other=0.0)
        value = tl.load(values + place, mask=is_past[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key), out_dtype=tl.float32) * scale
        scores = tl.where(is_past[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(most - higher)
        acc = acc * shrink[:, None] + tl.dot(weights.to(value.dtype), value, out_dtype=tl.float32)
        total = total * shrink + tl.sum(weights, 1)
        most = higher
    out = (b * N + kv * GROUP + g) * num_parts + part
    tl.store(partial + out[:, None] * D + d[None, :], acc, mask=is_head[:, None])
    tl.store(largest + out, most, mask=is_head)
    tl.store(sums + out, total, mask=is_head)


@triton.jit
def _join_kernel(
    partial, largest, sums, out, num_parts,
    D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    part = tl.arange(0, BLOCK_P)
    mask = part < num_parts
    at = head * num_parts + part
    most = tl.load(largest + at, mask=mask, other=float("-inf"))
    share = tl.exp(most - tl.max(most, 0))
    acc = tl.load(partial + at[:, None] * D + d[None, :], mask=mask[:, None], other=0.0)
    total = tl.sum(share * tl.load(sums + at, mask=mask, other=0.0), 0)
    joined = tl.sum(share[:, None] * acc, 0) / total
    tl.store(out + head * D + d, joined.to(out.dtype.element_ty))


def decode_attention_(qkv, cos, sin, positions, keys, values, scale) -> tuple[Tensor, Join]:
    B, M, L, D = keys.shape
    N = qkv.shape[1] // D - 2 * M
    block = max(min(_BLOCK_BYTES // (D * qkv.element_size()), _MAX_BLOCK), _MIN_BLOCK)
    parts = max(1, min(_PROGRAMS // (B * M), triton.cdiv(L, block), _MAX_PARTS))
    partial = torch.empty(B, N, parts, D, dtype=torch.float32, device=qkv.device)
    largest, sums = torch.empty(2, B, N, parts, dtype=torch.float32, device=qkv.device)
    _attend_kernel[(parts, M, B)](
        qkv, cos, sin, positions, keys, values, partial, largest, sums, scale, L, parts,
        N=N, M=M, D=D, BLOCK_G=max(triton.next_power_of_2(N // M), 16), BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return partial.view(B, -1), Join(largest, sums, qkv.dtype)


def join(sums_of_values, how) -> Tensor:
    B, N, parts = how.largest.shape
    D = sums_of_values.shape[1] // (N * parts)
    out = torch.empty(B, N * D, dtype=how.dtype, device=sums_of_values.device)
    _join_kernel[(B * N,)](
        sums_of_values, how.largest, how.sums, out, parts,
        D=D, BLOCK_P=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    return out
