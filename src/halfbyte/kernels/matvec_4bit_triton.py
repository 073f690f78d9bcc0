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

from halfbyte.kernels.lookup_4bit import lookup
from halfbyte.kernels.matvec_4bit import apply_before
from halfbyte.kernels.matvec_4bit import matvec_4bit as _dispatching_matvec_4bit
from halfbyte.kernels.rms_norm import Norm

MAX_TOKENS = 128
# A warp, and with four rows for each of its lanes 128 registers: no more would be resident.
_LANES, _MATVEC_ROWS = 32, 4
_MATMUL_ROWS = 32
_PREPARE_PROGRAMS = 16


@triton.jit
def _level(codes, tables, i: tl.constexpr):
    shift: tl.constexpr = 4 * (i ^ 1)
    return tl.load(tables + ((codes >> shift) & 15))


@triton.jit
def _values(codes, tables, ASM: tl.constexpr):
    """Return the eight values of each word of codes, in the order of the elements."""
    if ASM == "":
        v0, v1 = _level(codes, tables, 0), _level(codes, tables, 1)
        v2, v3 = _level(codes, tables, 2), _level(codes, tables, 3)
        v4, v5 = _level(codes, tables, 4), _level(codes, tables, 5)
        v6, v7 = _level(codes, tables, 6), _level(codes, tables, 7)
    else:
        # As loaded values the tables stay in registers; constants would be moved there every time.
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [codes, tl.load(tables), tl.load(tables + 1), tl.load(tables + 2), tl.load(tables + 3),
             tl.load(tables + 4), tl.load(tables + 5), tl.load(tables + 6), tl.load(tables + 7)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32,
                   tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _scales(absmax, nested, nested_map, offset, blocks, mask, NESTED: tl.constexpr):
    if NESTED:
        code = tl.load(absmax + blocks, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested + blocks // 256, mask=mask, other=0.0)
        scale = tl.load(nested_map + code) * scale + offset
    else:
        scale = tl.load(absmax + blocks, mask=mask, other=0.0)
    return scale


@triton.jit
def _codes(packed, row, is_row, words, WORDS: tl.constexpr):
    mask = is_row[:, None] & (words < WORDS)
    at = packed + row[:, None] * WORDS + words
    return tl.load(at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    else:  # tanh(z) = 2 sigmoid(2 z) - 1
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * z))
    return y


@triton.jit
def _prepare_kernel(
    x, norm, eps, lora_A, prepared, xa, num_ranks, x_scale,
    K: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Program p makes element p of `f(x) A^T` and writes SHARE elements of f(x).

    What is written is float32, scaled, and by planes: element 8 w + i is at `i K / 8 + w`, so that
    the eight elements that meet a word of codes are eight loads of neighbouring lanes.
    """
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    scale = 1.0
    if BEFORE == "norm":
        for start in tl.static_range(0, K, BLOCK):
            value = tl.load(x + start + offs, mask=start + offs < K, other=0.0).to(tl.float32)
            total += value * value
        scale = tl.rsqrt(tl.sum(total, 0) / K + eps)
        total = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        at = start + offs
        mask = at < K
        a = tl.load(lora_A + pid * K + at, mask=mask & (pid < num_ranks), other=0.0)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if BEFORE == "norm":
            value = value * scale * tl.load(norm + at, mask=mask, other=0.0)
        elif BEFORE != "":
            up = tl.load(x + K + at, mask=mask, other=0.0).to(tl.float32)
            value = _activate(value, BEFORE) * up
        value = value.to(x.dtype.element_ty).to(tl.float32)
        total += value * a.to(tl.float32)
        mine = mask & (at // SHARE == pid)
        tl.store(prepared + at % 8 * (K // 8) + at // 8, value * x_scale, mask=mine)
    tl.store(xa + pid, tl.sum(total, 0), mask=pid < num_ranks)


@triton.jit
def _matvec_kernel(
    x, xa, lora_B, bias, residual, out, tables,
    packed0, absmax0, nested0, map0, offset0,
    packed1, absmax1, nested1, map1, offset1,
    packed2, absmax2, nested2, map2, offset2,
    N0, N1, N2,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    K: tl.constexpr, SIZE: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
    ASM: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one of the siblings; a lane takes 16 bytes, 32 weights, of each at a time."""
    tile = tl.program_id(0)
    sibling, first, N = 0, 0, N0
    packed, absmax, nested, nested_map, offset = packed0, absmax0, nested0, map0, offset0
    if tile >= tl.cdiv(N0, ROWS):
        tile -= tl.cdiv(N0, ROWS)
        sibling, first, N = 1, N0, N1
        packed, absmax, nested, nested_map, offset = packed1, absmax1, nested1, map1, offset1
        if tile >= tl.cdiv(N1, ROWS):
            tile -= tl.cdiv(N1, ROWS)
            sibling, first, N = 2, N0 + N1, N2
            packed, absmax, nested, nested_map, offset = packed2, absmax2, nested2, map2, offset2
    row = tile * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    mean = 0.0
    if NESTED:
        mean = tl.load(offset)
    WORDS: tl.constexpr = K // 8
    words = tl.arange(0, LANES * 4)[None, :]
    # Of these words; where blocks are longer, a part of one.
    NUM_BLOCKS: tl.constexpr = max(LANES * 32 // SIZE, 1)
    codes = _codes(packed, row, is_row, words, WORDS)
    acc = tl.zeros([ROWS, LANES], tl.float32)
    for start in tl.range(0, WORDS, LANES * 4):
        ahead = _codes(packed, row, is_row, words + LANES * 4, WORDS)
        block = start * 8 // SIZE + tl.arange(0, NUM_BLOCKS)[None, :]
        scale = _scales(
            absmax, nested, nested_map, mean, row[:, None] * (K // SIZE) + block,
            is_row[:, None] & (block < K // SIZE), NESTED,
        )  # fmt: skip
        is_in = words < WORDS
        x0 = tl.load(x + words, mask=is_in, other=0.0)
        x1 = tl.load(x + WORDS + words, mask=is_in, other=0.0)
        x2 = tl.load(x + 2 * WORDS + words, mask=is_in, other=0.0)
        x3 = tl.load(x + 3 * WORDS + words, mask=is_in, other=0.0)
        x4 = tl.load(x + 4 * WORDS + words, mask=is_in, other=0.0)
        x5 = tl.load(x + 5 * WORDS + words, mask=is_in, other=0.0)
        x6 = tl.load(x + 6 * WORDS + words, mask=is_in, other=0.0)
        x7 = tl.load(x + 7 * WORDS + words, mask=is_in, other=0.0)
        v0, v1, v2, v3, v4, v5, v6, v7 = _values(codes, tables, ASM)
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
    at = first + row
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        is_rank = ranks < RANK
        b = tl.load(
            lora_B + at[:, None] * RANK + ranks[None, :],
            mask=is_row[:, None] & is_rank[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        y += tl.sum(b * tl.load(xa + sibling * RANK + ranks, mask=is_rank, other=0.0)[None, :], 1)
    if HAS_BIAS:
        y += tl.load(bias + at, mask=is_row, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + at, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=is_row)


@triton.jit
def _both(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return columns of a and b in turn."""
    return tl.join(a, b).reshape(ROWS, 2 * COLUMNS)


@triton.jit
def _matmul_kernel(
    x, xa, lora_B, bias, residual, out, tables,
    packed0, absmax0, nested0, map0, offset0,
    packed1, absmax1, nested1, map1, offset1,
    packed2, absmax2, nested2, map2, offset2,
    N0, N1, N2, T, total_ranks,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    K: tl.constexpr, SIZE: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
    ASM: tl.constexpr, X_SCALE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one of the siblings for all tokens, through tensor cores."""
    tile = tl.program_id(0)
    sibling, first, N = 0, 0, N0
    packed, absmax, nested, nested_map, offset = packed0, absmax0, nested0, map0, offset0
    if tile >= tl.cdiv(N0, ROWS):
        tile -= tl.cdiv(N0, ROWS)
        sibling, first, N = 1, N0, N1
        packed, absmax, nested, nested_map, offset = packed1, absmax1, nested1, map1, offset1
        if tile >= tl.cdiv(N1, ROWS):
            tile -= tl.cdiv(N1, ROWS)
            sibling, first, N = 2, N0 + N1, N2
            packed, absmax, nested, nested_map, offset = packed2, absmax2, nested2, map2, offset2
    row = tile * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    mean = 0.0
    if NESTED:
        mean = tl.load(offset)
    element = x.dtype.element_ty
    token = tl.arange(0, BLOCK_T)
    is_token = token < T
    WIDTH: tl.constexpr = COLUMNS // 8
    acc = tl.zeros([BLOCK_T, ROWS], tl.float32)
    for start in tl.range(0, K, COLUMNS):
        words = start // 8 + tl.arange(0, WIDTH)[None, :]
        mask = is_row[:, None] & (words < K // 8)
        codes = tl.load(packed + row[:, None] * (K // 8) + words, mask=mask, other=0)
        scale = _scales(
            absmax, nested, nested_map, mean, row[:, None] * (K // SIZE) + words // (SIZE // 8),
            mask, NESTED,
        )  # fmt: skip
        v0, v1, v2, v3, v4, v5, v6, v7 = _values(codes, tables, ASM)
        v0 = _both(_both(v0, v4, ROWS, WIDTH), _both(v2, v6, ROWS, WIDTH), ROWS, 2 * WIDTH)
        v1 = _both(_both(v1, v5, ROWS, WIDTH), _both(v3, v7, ROWS, WIDTH), ROWS, 2 * WIDTH)
        level = (_both(v0, v1, ROWS, 4 * WIDTH) * X_SCALE) * SCALE + SHIFT
        scale = tl.broadcast_to(scale[:, :, None], (ROWS, WIDTH, 8)).reshape(ROWS, COLUMNS)
        column = start + tl.arange(0, COLUMNS)
        values = tl.load(
            x + token[:, None] * K + column[None, :],
            mask=is_token[:, None] & (column < K)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(values, tl.trans((level * scale).to(element)), acc)
    at = first + row
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        is_rank = ranks < RANK
        b = tl.load(
            lora_B + at[None, :] * RANK + ranks[:, None],
            mask=is_row[None, :] & is_rank[:, None], other=0.0,
        )  # fmt: skip
        low = tl.load(
            xa + token[:, None] * total_ranks + sibling * RANK + ranks[None, :],
            mask=is_token[:, None] & is_rank[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(low, b, acc)
    if HAS_BIAS:
        acc += tl.load(bias + at, mask=is_row, other=0.0).to(tl.float32)[None, :]
    target = token[:, None] * (N0 + N1 + N2) + at[None, :]
    mask = is_token[:, None] & is_row[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + target, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + target, acc.to(element), mask=mask)


def _fits(x, group) -> bool:
    """Whether the kernels can serve the group: up to three 4-bit weights of one kind."""
    first = group.weights[0]
    if len(group.weights) > 3 or any(isinstance(w, Tensor) for w in group.weights):
        return False
    kind = (first.block_size, first.quant_type, first.nested_absmax is None)
    return (
        1 <= x.shape[0] <= MAX_TOKENS
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and first.shape[1] % first.block_size == 0
        and all(
            (w.block_size, w.quant_type, w.nested_absmax is None) == kind for w in group.weights
        )
    )


def _weights(group, absent) -> tuple[list[Tensor], list[int]]:
    """Return the pointers of up to three weights, and their numbers of rows."""
    pointers, rows = [], []
    for i in range(3):
        weight = group.weights[i if i < len(group.weights) else 0]
        scales = (weight.nested_absmax, weight.nested_map, weight.offset)
        pointers += [weight.packed.view(-1).view(torch.int32), weight.absmax]
        pointers += scales if weight.nested_absmax is not None else (absent,) * 3
        rows.append(weight.shape[0] if i < len(group.weights) else 0)
    return pointers, rows


def matvec_4bit(x, group, *, before=None, residual=None, rows=None) -> Tensor:
    if not _fits(x, group):
        reference = _dispatching_matvec_4bit.__wrapped__  # type: ignore[attr-defined]
        return reference(x, group, before=before, residual=residual)
    first = group.weights[0]
    how = lookup(first.quant_type, x.device)
    with torch.cuda.device_of(x):
        if x.shape[0] > 1:
            return _matmul(x, group, before, residual, how, rows or _MATMUL_ROWS)
        prepared, xa = prepare(x, group, before, how.x_scale)
        return multiply(prepared, xa, group, residual, x.dtype, how, rows or _MATVEC_ROWS)


def prepare(x, group, before, x_scale) -> tuple[Tensor, Tensor]:
    """Return f(x) in the order of the second launch, and `f(x) A^T`, both float32."""
    K = group.weights[0].shape[1]
    ranks = 0 if group.lora_A is None else group.lora_A.shape[0]
    prepared = torch.empty(K, dtype=torch.float32, device=x.device)
    xa = torch.empty(max(ranks, 1), dtype=torch.float32, device=x.device)
    is_norm = isinstance(before, Norm)
    block = min(triton.next_power_of_2(K), 16384)
    programs = max(ranks, _PREPARE_PROGRAMS)
    _prepare_kernel[(programs,)](
        x, before.weight if is_norm else xa, before.eps if is_norm else 0.0,
        x if group.lora_A is None else group.lora_A, prepared, xa, ranks, x_scale,
        K=K, BEFORE="norm" if is_norm else "" if before is None else before.activation,
        BLOCK=block, SHARE=triton.cdiv(K, programs), num_warps=max(min(block // 512, 16), 1),
    )  # fmt: skip
    return prepared, xa


def multiply(prepared, xa, group, residual, dtype, how, rows) -> Tensor:
    """Return what is left to do for one token after `prepare`, `[1, N]`."""
    first = group.weights[0]
    pointers, outputs = _weights(group, prepared)
    rank = 0 if group.lora_A is None else group.lora_A.shape[0] // len(group.weights)
    out = torch.empty(1, sum(outputs), dtype=dtype, device=prepared.device)
    _matvec_kernel[(sum(triton.cdiv(n, rows) for n in outputs),)](
        prepared, xa, *(out if t is None else t for t in (group.lora_B, group.bias, residual)),
        out, how.tables, *pointers, *outputs,
        RANK=rank, BLOCK_R=triton.next_power_of_2(max(rank, 1)),
        HAS_BIAS=group.bias is not None, HAS_RESIDUAL=residual is not None,
        K=first.shape[1], SIZE=first.block_size, NESTED=first.nested_absmax is not None,
        ROWS=rows, LANES=_LANES, ASM=how.asm, SCALE=how.scale, SHIFT=how.shift / how.x_scale,
        num_warps=1,
    )  # fmt: skip
    return out


def _matmul(x, group, before, residual, how, rows) -> Tensor:
    x = apply_before(x, before)
    first = group.weights[0]
    pointers, outputs = _weights(group, x)
    ranks = 0 if group.lora_A is None else group.lora_A.shape[0]
    xa = x @ group.lora_A.t() if ranks else x
    rank = ranks // len(group.weights)
    T, N = x.shape[0], sum(outputs)
    block_t = max(triton.next_power_of_2(T), 16)
    out = torch.empty(T, N, dtype=x.dtype, device=x.device)
    _matmul_kernel[(sum(triton.cdiv(n, rows) for n in outputs),)](
        x, xa, *(out if t is None else t for t in (group.lora_B, group.bias, residual)),
        out, how.tables, *pointers, *outputs, T, ranks,
        RANK=rank, BLOCK_R=max(triton.next_power_of_2(max(rank, 1)), 16),
        HAS_BIAS=group.bias is not None, HAS_RESIDUAL=residual is not None,
        K=first.shape[1], SIZE=first.block_size, NESTED=first.nested_absmax is not None,
        ROWS=rows, COLUMNS=128, BLOCK_T=block_t,
        ASM=how.asm, X_SCALE=how.x_scale, SCALE=how.scale, SHIFT=how.shift,
        num_warps=4, num_stages=4 if block_t <= 32 else 3,
    )  # fmt: skip
    return out
