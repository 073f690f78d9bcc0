"""The gated activation of a decoder's MLP, on CUDA: each element read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels import gated
from halfbyte.kernels.border import new_with_border
from halfbyte.kernels.dropout import Mask
from halfbyte.kernels.dropout_triton import kept, row_keys
from halfbyte.kernels.sizes import cdiv, next_power_of_2
from halfbyte.kernels.skinny_triton import (
    FEW_TOKENS,
    MAX_RANKS,
    add_splits,
    block_ranks,
    is_aligned,
    mask_arguments,
    splits_of,
)

# 4 warps x 8 elements of 16 bits = 16 bytes a thread and access.
_BLOCK = 1024
# (tokens, columns, warps, stages) of a tile of the forward that makes `x A^T` too. At 8,192 tokens
# of Llama 8B on an H100 288 us with dropout; in two kernels 365 us, and 350 without dropout.
_PRODUCT_TILE = (32, 128, 4, 3)
# With dropout and few tokens: at 2,048 tokens 82 us instead of 95.
_PRODUCT_TILE_OF_FEW = (16, 128, 4, 3)
# (tokens, warps) of a tile of the backward, by whether there is dropout. At 8,192 tokens of Llama
# 8B on an H100 they took 569 and 501 us (538 in tiles of 32 tokens), those of few at 2,048 tokens
# 166 us (185 in the others) and 155.
_TILES = {True: (32, 8), False: (64, 8)}
_TILES_OF_FEW = {True: (16, 4), False: (32, 4)}
# Where a tile holds more, by the 99 KiB of shared memory that consumer cards have.
_SMALL_TILE, _FEW_RANKS = (32, 4), 16


@triton.jit
def _once(x, ONCE: tl.constexpr):
    """Return 16-bit x as it is, computed once (by inline PTX, where that is).

    What goes to memory and into a product is wanted in two layouts, and the compiler would compute
    all that leads to it twice, exponentials too, rather than carry it from one to the other.
    """
    if ONCE:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    return x


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _act_and_slope(gate, ACT: tl.constexpr):
    """Return act(gate) and its derivative."""
    if ACT == "silu":
        sig = tl.sigmoid(gate)
        act = gate * sig
        slope = sig + act * (1.0 - sig)
    else:
        # 0.5 g (1 + tanh(c (g + k g^3))), c = sqrt(2 / pi), k = 0.044715
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        tanh = _tanh(inner)
        act = 0.5 * gate * (1.0 + tanh)
        inner_slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * gate * gate)
        slope = 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh * tanh) * inner_slope
    return act, slope


@triton.jit
def _gated_forward_kernel(
    gate_up_ptr, out_ptr, stride_in, stride_out, size, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    gate = tl.load(gate_up_ptr + row * stride_in + offs, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * stride_in + size + offs, mask=mask, other=0.0)
    act, _ = _act_and_slope(gate.to(tl.float32), ACT)
    out = act * up.to(tl.float32)
    tl.store(out_ptr + row * stride_out + offs, out.to(gate.dtype), mask=mask)


@triton.jit(do_not_specialize=["salt", "threshold", "T", "K_split"])
def _gated_product_kernel(
    gate_up_ptr, out_ptr, A_ptr, partial_ptr, seed_ptr, salt, threshold,
    stride_in, stride_out, stride_A, T, size, K_split,
    R: tl.constexpr, BLOCK_R: tl.constexpr, ACT: tl.constexpr, DROPS: tl.constexpr,
    ALIGNED: tl.constexpr, ONCE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        stride_in, stride_out = stride_in // 8 * 8, stride_out // 8 * 8
        stride_A = stride_A // 8 * 8
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    row_mask, rank_mask = rows < T, ranks < R
    if DROPS:
        keys, key = row_keys(seed_ptr, salt, rows)
    sums = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for block in range(0, K_split):
        first = (split * K_split + block) * BLOCK_K
        columns = first + tl.arange(0, BLOCK_K)
        column_mask = columns < size
        mask = row_mask[:, None] & column_mask[None, :]
        gate_ptrs = gate_up_ptr + rows[:, None] * stride_in + columns[None, :]
        gate = tl.load(gate_ptrs, mask=mask, other=0.0)
        up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
        A = tl.load(
            A_ptr + ranks[None, :] * stride_A + columns[:, None],
            mask=column_mask[:, None] & rank_mask[None, :], other=0.0,
        )  # fmt: skip
        act, _ = _act_and_slope(gate.to(tl.float32), ACT)
        hidden = _once((act * up).to(gate.dtype), ONCE)
        tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], hidden, mask=mask)
        if DROPS:
            hidden = tl.where(kept(keys, key, first, threshold, BLOCK_T, BLOCK_K), hidden, 0.0)
        sums = tl.dot(hidden, A, sums, input_precision="ieee")
    target = partial_ptr + (split.to(tl.int64) * T + rows)[:, None] * R + ranks[None, :]
    tl.store(target, sums, mask=row_mask[:, None] & rank_mask[None, :])


@triton.jit(do_not_specialize=["salt", "threshold", "T"])
def _gated_backward_kernel(
    gate_up_ptr, grad_ptr, gate_xa_ptr, up_xa_ptr, gb_ptr, A_ptr, out_ptr,
    seed_ptr, salt, threshold, scale,
    stride_in, stride_grad, stride_xa, stride_gb, stride_A, T, size, tokens_per_split,
    RG: tl.constexpr, RU: tl.constexpr, R2: tl.constexpr,
    BLOCK_R1: tl.constexpr, BLOCK_R2: tl.constexpr,
    ACT: tl.constexpr, DROPS: tl.constexpr, ADDS: tl.constexpr, ONCE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(0) * BLOCK_I
    columns = first_column + tl.arange(0, BLOCK_I)
    column_mask = columns < size
    split = tl.program_id(1).to(tl.int64)
    ranks1, ranks2 = tl.arange(0, BLOCK_R1), tl.arange(0, BLOCK_R2)
    grad_gate = tl.zeros((BLOCK_I, BLOCK_R1), tl.float32)
    grad_up = tl.zeros((BLOCK_I, BLOCK_R1), tl.float32)
    grad_down = tl.zeros((BLOCK_I, BLOCK_R2), tl.float32)
    if ADDS:
        A = tl.load(
            A_ptr + ranks2[:, None] * stride_A + columns[None, :],
            mask=(ranks2 < R2)[:, None] & column_mask[None, :], other=0.0,
        )  # fmt: skip
    first = split * tokens_per_split
    for start in range(0, tokens_per_split, BLOCK_T):
        rows = first + start + tl.arange(0, BLOCK_T)
        row_mask = rows < tl.minimum(T, first + tokens_per_split)
        mask = row_mask[:, None] & column_mask[None, :]
        gate_ptrs = gate_up_ptr + rows[:, None] * stride_in + columns[None, :]
        gate = tl.load(gate_ptrs, mask=mask, other=0.0)
        up = tl.load(gate_ptrs + size, mask=mask, other=0.0).to(tl.float32)
        grad_ptrs = grad_ptr + rows[:, None] * stride_grad + columns[None, :]
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        act, slope = _act_and_slope(gate.to(tl.float32), ACT)
        if R2 > 0:
            gb = tl.load(
                gb_ptr + rows[:, None] * stride_gb + ranks2[None, :],
                mask=row_mask[:, None] & (ranks2 < R2)[None, :], other=0.0,
            )  # fmt: skip
            hidden = _once((act * up).to(gate.dtype), ONCE)
            if DROPS:
                keys, key = row_keys(seed_ptr, salt, rows)
                stays = kept(keys, key, first_column, threshold, BLOCK_T, BLOCK_I)
                hidden = tl.where(stays, hidden, 0.0)
                if ADDS:
                    product = tl.dot(gb, A, input_precision="ieee") * scale
                    grad += tl.where(stays, product, 0.0)
        d_gate = _once((grad * up * slope).to(gate.dtype), ONCE)
        d_up = _once((grad * act).to(gate.dtype), ONCE)
        tl.store(gate_ptrs, d_gate, mask=mask)
        tl.store(gate_ptrs + size, d_up, mask=mask)
        xa_offs = rows[:, None] * stride_xa + ranks1[None, :]
        if RG > 0:
            xa_mask = row_mask[:, None] & (ranks1 < RG)[None, :]
            xa = tl.load(gate_xa_ptr + xa_offs, mask=xa_mask, other=0.0)
            grad_gate = tl.dot(tl.trans(d_gate), xa, grad_gate, input_precision="ieee")
        if RU > 0:
            xa_mask = row_mask[:, None] & (ranks1 < RU)[None, :]
            xa = tl.load(up_xa_ptr + xa_offs, mask=xa_mask, other=0.0)
            grad_up = tl.dot(tl.trans(d_up), xa, grad_up, input_precision="ieee")
        if R2 > 0:
            grad_down = tl.dot(tl.trans(hidden), gb, grad_down, input_precision="ieee")
    # Partial sums of a split, one after the other; the sum over splits keeps an order.
    gate_ptr = out_ptr + split * size * (RG + RU + R2)
    up_ptr = gate_ptr + size * RG
    if RG > 0:
        ptrs = gate_ptr + columns[:, None] * RG + ranks1[None, :]
        tl.store(ptrs, grad_gate, mask=column_mask[:, None] & (ranks1 < RG)[None, :])
    if RU > 0:
        ptrs = up_ptr + columns[:, None] * RU + ranks1[None, :]
        tl.store(ptrs, grad_up, mask=column_mask[:, None] & (ranks1 < RU)[None, :])
    if R2 > 0:
        ptrs = up_ptr + size * RU + ranks2[:, None] * size + columns[None, :]
        mask = (ranks2 < R2)[:, None] & column_mask[None, :]
        tl.store(ptrs, tl.trans(grad_down) * scale, mask=mask)


def _has_ptx(x: Tensor) -> bool:
    """Return whether inline PTX works on x by pairs: Triton's interpreter (on a CPU) has none."""
    return x.is_cuda and x.dtype.itemsize == 2


def gated_forward(gate_up: Tensor, size: int, activation: str, *, columns: int = 0) -> Tensor:
    T = gate_up.shape[0]
    out = new_with_border(gate_up, T, size, columns)
    if T:
        _gated_forward_kernel[(T, cdiv(size, _BLOCK))](
            gate_up, out, gate_up.stride(0), out.stride(0), size, ACT=activation, BLOCK=_BLOCK
        )
    return out


def gated_product(
    gate_up: Tensor,
    size: int,
    activation: str,
    lora_A: Tensor,
    *,
    scaling: float = 1.0,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor]:
    T, R = gate_up.shape[0], lora_A.shape[0]
    if not T or not 0 < R <= MAX_RANKS:
        return gated.gated_product.__wrapped__(
            gate_up, size, activation, lora_A, scaling=scaling, mask=mask
        )
    is_few = mask is not None and T <= FEW_TOKENS
    block_t, block_k, warps, stages = _PRODUCT_TILE_OF_FEW if is_few else _PRODUCT_TILE
    # Consumer cards have 99 KiB of shared memory a program, and a stage holds gate, up and A.
    if gate_up.element_size() > 2:
        stages = 1
    elif block_ranks(R) > 64:
        stages = 2
    out = new_with_border(gate_up, T, size, R)
    splits, each = splits_of(cdiv(size, block_k), cdiv(T, block_t))
    partial = torch.empty(splits, T, R, dtype=torch.float32, device=gate_up.device)
    _gated_product_kernel[(cdiv(T, block_t), splits)](
        gate_up, out, lora_A, partial, *mask_arguments(mask, partial),
        gate_up.stride(0), out.stride(0), lora_A.stride(0), T, size, each,
        R=R, BLOCK_R=block_ranks(R), ACT=activation, DROPS=mask is not None,
        ALIGNED=is_aligned(gate_up, out, lora_A), ONCE=_has_ptx(gate_up),
        BLOCK_T=block_t, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, add_splits(partial, out[:, size:], mask, scaling)


def _backward_tile(tokens: int, ranks: int, itemsize: int, *, drops: bool) -> tuple[int, int]:
    """Return tokens and warps of a tile of the backward."""
    is_wide = ranks > (gated.LARGE_RANKS if drops else _FEW_RANKS)
    if is_wide or itemsize > 2:
        return _SMALL_TILE
    return (_TILES_OF_FEW if tokens <= FEW_TOKENS else _TILES)[drops]


def gated_backward_(
    gate_up: Tensor,
    grad_hidden: Tensor,
    xas: tuple[Tensor, Tensor],
    down_gb: Tensor,
    size: int,
    activation: str,
    mask: Mask | None = None,
    lora_A: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    T = gate_up.shape[0]
    RG, RU, R2 = (t.shape[1] for t in (*xas, down_gb))
    ranks = max(RG, RU, R2)
    block_t, warps = _backward_tile(T, ranks, gate_up.element_size(), drops=mask is not None)
    block_i, splits = gated.backward_columns(ranks), gated.backward_splits(T, size, ranks)
    column_blocks = cdiv(size, block_i)
    tokens = cdiv(cdiv(T, splits), block_t) * block_t
    new = torch.empty if T else torch.zeros
    partial = new(splits, size * (RG + RU + R2), dtype=torch.float32, device=gate_up.device)
    A = partial if lora_A is None else lora_A
    if T:
        _gated_backward_kernel[(column_blocks, splits)](
            gate_up, grad_hidden, *xas, down_gb, A, partial,
            *((partial, 0, 0, 1.0) if mask is None else (*mask[1:], mask.threshold, mask.scale)),
            gate_up.stride(0), grad_hidden.stride(0), xas[0].stride(0), down_gb.stride(0),
            A.stride(0), T, size, tokens,
            RG=RG, RU=RU, R2=R2, BLOCK_R1=max(next_power_of_2(max(RG, RU)), 16),
            BLOCK_R2=max(next_power_of_2(R2), 16),
            ACT=activation, DROPS=mask is not None, ADDS=A is lora_A and mask is not None,
            # With dropout computing twice was faster: 653 us, else 704.
            ONCE=mask is None and _has_ptx(gate_up),
            BLOCK_I=block_i, BLOCK_T=block_t, num_warps=warps,
        )  # fmt: skip
    total = partial.sum(0) if splits > 1 else partial[0]
    gate_B, up_B, down_A = total.split([size * R for R in (RG, RU, R2)])
    return gate_B.view(size, RG), up_B.view(size, RU), down_A.view(R2, size)
