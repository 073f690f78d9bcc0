"""Products of one or a few tokens with 4-bit weights on CUDA.

One token takes two launches. The first applies what stands before the product, makes `x A^T` and
puts x in order for the second, which reads the codes: a program is one warp, and a lane reads 16
bytes of each of its rows at a time.

`lookup_4bit` says how codes become numbers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.decode_attention import Join
from halfbyte.kernels.lookup_4bit import lookup
from halfbyte.kernels.matvec_4bit_parts import Gate
from halfbyte.kernels.matvec_4bit_parts import before_product as apply_before
from halfbyte.kernels.matvec_4bit_parts_triton import (
    before_product,
    norm_scale,
    sibling_of,
    weights_of,
)
from halfbyte.kernels.matvec_4bit_tokens import several_tokens as reference
from halfbyte.kernels.matvec_4bit_tokens_triton import several_tokens
from halfbyte.kernels.rms_norm import Norm

MAX_TOKENS = 128
_LANES = 32
# Rows of a program, which is one warp, and its registers. Of Llama 8B's four products on an H100
# 4 and 168 took 86.9 us together, 4 and 128 87.5, 2 and 80 91.6, 8 and 255 100.7; two or four warps
# that share the rows of few outputs gained nothing either.
_ROWS, _REGISTERS = 4, 168
# Of the first launch: programs of a part at least, inputs of a part at most, and these times the
# parts of attention that are joined there.
_PREPARE_PROGRAMS, _MAX_BLOCK, _MAX_JOINED = 16, 4096, 8192


@triton.jit
def _level(codes, tables, i: tl.constexpr):
    shift: tl.constexpr = 4 * (i ^ 1)
    return tl.load(tables + ((codes >> shift) & 15))


@triton.jit
def _words(tables, ASM: tl.constexpr):
    """Return the eight words of the tables, in registers of each lane.

    The compiler would move what is the same for all lanes there anew for each use: z is 0, but that
    it cannot tell.
    """
    if ASM == "":
        # The interpreter reads the levels from memory.
        t0, t1, t2, t3, t4, t5, t6, t7 = 0, 0, 0, 0, 0, 0, 0, 0
    else:
        z = tl.inline_asm_elementwise(
            "{ .reg .b32 m; mov.u32 m, %lanemask_lt; shr.u32 $0, m, 31; }", "=r,r",
            [tl.load(tables)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        t0, t1 = tl.load(tables) ^ z, tl.load(tables + 1) ^ z
        t2, t3 = tl.load(tables + 2) ^ z, tl.load(tables + 3) ^ z
        t4, t5 = tl.load(tables + 4) ^ z, tl.load(tables + 5) ^ z
        t6, t7 = tl.load(tables + 6) ^ z, tl.load(tables + 7) ^ z
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def _values(codes, tables, t0, t1, t2, t3, t4, t5, t6, t7, ASM: tl.constexpr):
    """Return the eight values of each word of codes, in the order of the elements."""
    if ASM == "":
        v0, v1 = _level(codes, tables, 0), _level(codes, tables, 1)
        v2, v3 = _level(codes, tables, 2), _level(codes, tables, 3)
        v4, v5 = _level(codes, tables, 4), _level(codes, tables, 5)
        v6, v7 = _level(codes, tables, 6), _level(codes, tables, 7)
    else:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [codes, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32,
                   tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _codes(packed, row, is_row, words, WORDS: tl.constexpr):
    mask = is_row[:, None] & (words < WORDS)
    at = packed + row[:, None] * WORDS + words
    return tl.load(at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _scale_parts(absmax, nested, row, is_row, block, BLOCKS: tl.constexpr, NESTED: tl.constexpr):
    """Return what the scales of these blocks are made of: codes and their scales, or themselves."""
    at = row[:, None] * BLOCKS + block
    mask = is_row[:, None] & (block < BLOCKS)
    level = tl.load(absmax + at, mask=mask, other=0)
    outer = level
    if NESTED:
        outer = tl.load(nested + at // 256, mask=mask, other=0.0)
    return level, outer


@triton.jit
def _joined(
    x, largest, sums, start, num_parts, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Return attention at BLOCK inputs from `start` on, of all parts of their heads."""
    head = start // D + tl.arange(0, BLOCK // D)
    part = tl.arange(0, BLOCK_P)
    mask = (head < K // D)[:, None] & (part < num_parts)[None, :]
    at = head[:, None] * num_parts + part[None, :]
    most = tl.load(largest + at, mask=mask, other=float("-inf"))
    share = tl.load(sums + at, mask=mask, other=0.0)
    value = tl.load(
        x + at[:, :, None] * D + tl.arange(0, D)[None, None, :], mask=mask[:, :, None], other=0.0
    )
    # Heads behind the last one have nothing to be divided by.
    weight = tl.where(mask, tl.exp(most - tl.max(most, 1)[:, None]), 0.0)
    total = tl.sum(weight * share, 1)
    weight = weight / tl.where(total > 0, total, 1.0)[:, None]
    return tl.sum(value * weight[:, :, None], 1).reshape(BLOCK)


@triton.jit
def _prepare_kernel(
    x, norm, eps, sums, num_parts, lora_A, prepared, xa, num_ranks, x_scale,
    K: tl.constexpr, BEFORE: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr, SHARE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Program (p, q) makes element p of part q of `f(x) A^T`, and SHARE elements of f(x) there.

    What is written is float32, scaled, and by planes: element 8 w + i is at `i K / 8 + w`, so that
    the eight elements that meet a word of codes are eight loads of neighbouring lanes. For a join
    x are sums of values, `norm` the largest scores and `sums` theirs.
    """
    pid, start = tl.program_id(0), tl.program_id(1) * BLOCK
    at = start + tl.arange(0, BLOCK)
    a = tl.load(lora_A + pid * K + at, mask=(at < K) & (pid < num_ranks), other=0.0)
    # Else the compiler moves this load, which comes from afar, behind what has to wait for x.
    tl.debug_barrier()
    scale = 1.0
    if BEFORE == "norm":
        scale = norm_scale(x, eps, K, BLOCK)
    if BEFORE == "join":
        value = _joined(x, norm, sums, start, num_parts, K, D, BLOCK, BLOCK_P)
        # Rounded to the model's dtype, as attention's result would be.
        value = value.to(lora_A.dtype.element_ty).to(tl.float32)
        mask = (at < K) & ((at - start) // SHARE == pid)
        tl.store(prepared + at % 8 * (K // 8) + at // 8, value * x_scale, mask=mask)
    else:
        share = pid * SHARE + tl.arange(0, BLOCK_S)
        own = start + share
        mask = (own < K) & (share < (pid + 1) * SHARE) & (share < BLOCK)
        value = before_product(x, norm, scale, own, mask, K, BEFORE)
        tl.store(prepared + own % 8 * (K // 8) + own // 8, value * x_scale, mask=mask)
        value = before_product(x, norm, scale, at, at < K, K, BEFORE)
    total = tl.sum(value * a.to(tl.float32), 0)
    tl.store(xa + tl.program_id(1) * num_ranks + pid, total, mask=pid < num_ranks)


@triton.jit
def _matvec_kernel(
    x, xa, lora_B, bias, residual, out, tables,
    packed0, absmax0, nested0, map0, offset0,
    packed1, absmax1, nested1, map1, offset1,
    packed2, absmax2, nested2, map2, offset2,
    N0, N1, N2, num_ranks,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    K: tl.constexpr, SIZE: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
    ASM: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one of the siblings; a lane takes 16 bytes, 32 weights, of each at a time."""
    sibling, tile, first, N, packed, absmax, nested, nested_map, offset = sibling_of(
        tl.program_id(0), N0, N1, N2,
        packed0, absmax0, nested0, map0, offset0,
        packed1, absmax1, nested1, map1, offset1,
        packed2, absmax2, nested2, map2, offset2, ROWS,
    )  # fmt: skip
    row = tile * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    mean = 0.0
    if NESTED:
        mean = tl.load(offset)
    at = first + row
    # What is needed last is asked for first, and what the next step needs before this one's work.
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        is_rank = ranks < RANK
        b = tl.load(
            lora_B + at[:, None] * RANK + ranks[None, :],
            mask=is_row[:, None] & is_rank[None, :], other=0.0,
        )  # fmt: skip
        low = tl.zeros([BLOCK_R], tl.float32)
        for part in tl.static_range(PARTS):
            low += tl.load(xa + part * num_ranks + sibling * RANK + ranks, mask=is_rank, other=0.0)
    if HAS_RESIDUAL:
        beside = tl.load(residual + at, mask=is_row, other=0.0)
    WORDS: tl.constexpr = K // 8
    words = tl.arange(0, LANES * 4)[None, :]
    # Of these words; where blocks are longer, a part of one.
    NUM_BLOCKS: tl.constexpr = max(LANES * 32 // SIZE, 1)
    block = tl.arange(0, NUM_BLOCKS)[None, :]
    codes = _codes(packed, row, is_row, words, WORDS)
    level, outer = _scale_parts(absmax, nested, row, is_row, block, K // SIZE, NESTED)
    t0, t1, t2, t3, t4, t5, t6, t7 = _words(tables, ASM)
    acc = tl.zeros([ROWS, LANES], tl.float32)
    for start in tl.range(0, WORDS, LANES * 4):
        ahead = _codes(packed, row, is_row, words + LANES * 4, WORDS)
        scale = level
        if NESTED:
            scale = tl.load(nested_map + level.to(tl.int32)) * outer + mean
        block = (start + LANES * 4) * 8 // SIZE + tl.arange(0, NUM_BLOCKS)[None, :]
        level, outer = _scale_parts(absmax, nested, row, is_row, block, K // SIZE, NESTED)
        # Else the compiler moves these loads to where their results are needed.
        tl.debug_barrier()
        is_in = words < WORDS
        x0 = tl.load(x + words, mask=is_in, other=0.0)
        x1 = tl.load(x + WORDS + words, mask=is_in, other=0.0)
        x2 = tl.load(x + 2 * WORDS + words, mask=is_in, other=0.0)
        x3 = tl.load(x + 3 * WORDS + words, mask=is_in, other=0.0)
        x4 = tl.load(x + 4 * WORDS + words, mask=is_in, other=0.0)
        x5 = tl.load(x + 5 * WORDS + words, mask=is_in, other=0.0)
        x6 = tl.load(x + 6 * WORDS + words, mask=is_in, other=0.0)
        x7 = tl.load(x + 7 * WORDS + words, mask=is_in, other=0.0)
        v0, v1, v2, v3, v4, v5, v6, v7 = _values(codes, tables, t0, t1, t2, t3, t4, t5, t6, t7, ASM)
        s = v0 * x0
        s += v1 * x1
        s += v2 * x2
        s += v3 * x3
        s += v4 * x4
        s += v5 * x5
        s += v6 * x6
        s += v7 * x7
        s = tl.sum(s.reshape(ROWS, LANES, 4), 2) * SCALE
        if SHIFT != 0:
            total = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
            s += tl.sum(total.reshape(1, LANES, 4), 2) * SHIFT
        scale = tl.broadcast_to(scale[:, :, None], (ROWS, NUM_BLOCKS, LANES // NUM_BLOCKS))
        acc += s * scale.reshape(ROWS, LANES)
        codes = ahead
        words += LANES * 4
    y = tl.sum(acc, 1)
    if RANK > 0:
        y += tl.sum(b.to(tl.float32) * low[None, :], 1)
    if HAS_BIAS:
        y += tl.load(bias + at, mask=is_row, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += beside.to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=is_row)


def _fits(x, group) -> bool:
    """Whether the kernels can serve the group: up to three 4-bit weights of one kind.

    Several tokens need blocks of 64 or more.
    """
    first = group.weights[0]
    if len(group.weights) > 3 or any(isinstance(w, Tensor) for w in group.weights):
        return False
    kind = (first.block_size, first.quant_type, first.nested_absmax is None)
    return (
        1 <= x.shape[0] <= MAX_TOKENS
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and first.shape[1] % first.block_size == 0
        and (x.shape[0] == 1 or first.block_size >= 64)
        and all(
            (w.block_size, w.quant_type, w.nested_absmax is None) == kind for w in group.weights
        )
    )


def matvec_4bit(x, group, *, before=None, residual=None) -> Tensor:
    is_one = x.shape[0] == 1 and _fits(x, group)
    if is_one:
        how = lookup(group.weights[0].quant_type, x.device)
        dtype = before.dtype if isinstance(before, Join) else x.dtype
        prepared, xa = prepare(x, group, before, how.x_scale)
        return multiply(prepared, xa, group, residual, dtype, how)
    if isinstance(before, Join):
        x, before = apply_before(x, before), None
    product = several_tokens if _fits(x, group) else reference
    return product(x, group, before, residual)


def prepare(x, group, before, x_scale) -> tuple[Tensor, Tensor]:
    """Return f(x) in the order of the second launch, and `f(x) A^T` in parts, all float32."""
    K = group.weights[0].shape[1]
    ranks = 0 if group.lora_A is None else group.lora_A.shape[0]
    lora_A = x if group.lora_A is None else group.lora_A
    prepared = torch.empty(K, dtype=torch.float32, device=x.device)
    block, block_p, head, num_joined = min(triton.next_power_of_2(K), _MAX_BLOCK), 1, 1, 1
    kind, norm, sums, eps = "", prepared, prepared, 0.0
    if isinstance(before, Norm):
        kind, norm, eps = "norm", before.weight, before.eps
    elif isinstance(before, Gate):
        kind = before.activation
    elif isinstance(before, Join):
        kind, norm, sums = "join", before.largest, before.sums
        _, heads, num_joined = before.largest.shape
        head, block_p = K // heads, triton.next_power_of_2(num_joined)
        block = min(block, max(_MAX_JOINED // block_p, head))
        if group.lora_A is None:
            lora_A = torch.empty(1, dtype=before.dtype, device=x.device)
    programs, parts = max(ranks, _PREPARE_PROGRAMS), triton.cdiv(K, block)
    xa = torch.empty(parts, max(ranks, 1), dtype=torch.float32, device=x.device)
    share = triton.cdiv(block, programs)
    _prepare_kernel[(programs, parts)](
        x, norm, eps, sums, num_joined, lora_A, prepared, xa, ranks, x_scale,
        K=K, BEFORE=kind, D=head, BLOCK_P=block_p,
        BLOCK=block, SHARE=share, BLOCK_S=triton.next_power_of_2(share),
        num_warps=max(block * block_p // 512, 1),
    )  # fmt: skip
    return prepared, xa


def multiply(prepared, xa, group, residual, dtype, how) -> Tensor:
    """Return what is left to do for one token after `prepare`, `[1, N]`."""
    first = group.weights[0]
    pointers, outputs = weights_of(group, prepared, torch.int32)
    ranks = 0 if group.lora_A is None else group.lora_A.shape[0]
    rank = ranks // len(group.weights)
    out = torch.empty(1, sum(outputs), dtype=dtype, device=prepared.device)
    _matvec_kernel[(sum(triton.cdiv(n, _ROWS) for n in outputs),)](
        prepared, xa, *(out if t is None else t for t in (group.lora_B, group.bias, residual)),
        out, how.tables, *pointers, *outputs, ranks,
        RANK=rank, BLOCK_R=triton.next_power_of_2(max(rank, 1)), PARTS=xa.shape[0],
        HAS_BIAS=group.bias is not None, HAS_RESIDUAL=residual is not None,
        K=first.shape[1], SIZE=first.block_size, NESTED=first.nested_absmax is not None,
        ROWS=_ROWS, LANES=_LANES, ASM=how.asm, SCALE=how.scale, SHIFT=how.shift / how.x_scale,
        num_warps=1, maxnreg=_REGISTERS,
    )  # fmt: skip
    return out
