"""Products with one small side, on CUDA: partial sums of tiles, added up in a fixed order."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.dropout import Mask
from halfbyte.kernels.dropout_triton import kept, row_keys
from halfbyte.kernels.rms_norm import Factors
from halfbyte.kernels.sizes import cdiv, next_power_of_2
from halfbyte.kernels.skinny import product_float32

# (tokens, columns, warps, stages) of a tile, and programs wanted; [with dropout, without].
_PRODUCT_TILES = {True: (64, 64, 4, 4), False: (64, 128, 4, 4)}
_GRADIENT_TILES = {True: (32, 64, 4, 3), False: (32, 64, 4, 3)}
_PROGRAMS = 528
# With so few tokens, fewer programs of the product (splits to add up) serve better; measured at
# 2,048 tokens of Llama 8B on an H100, the others at 8,192.
FEW_TOKENS, _PROGRAMS_OF_FEW = 4096, 264
# Where nothing is dropped cuBLAS can serve, too.
_WITHOUT_DROPOUT = {"product": False, "gradient": False}
# More ranks than this are taken in turns: their accumulators would not fit into registers.
MAX_RANKS = 128


@triton.jit(do_not_specialize=["salt", "threshold", "T", "K_split"])
def _product_kernel(
    x_ptr, factor_ptr, partial_ptr, seed_ptr, salt, threshold,
    stride_x, stride_k, stride_r, T, K, K_split,
    R: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        # Not `tl.multiple_of`: of a scalar that is an argument, Triton forgets it.
        stride_x = stride_x // 8 * 8
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
        column_mask = columns < K
        x = tl.load(
            x_ptr + rows[:, None] * stride_x + columns[None, :],
            mask=row_mask[:, None] & column_mask[None, :], other=0.0,
        )  # fmt: skip
        factor = tl.load(
            factor_ptr + columns[:, None].to(tl.int64) * stride_k + ranks[None, :] * stride_r,
            mask=column_mask[:, None] & rank_mask[None, :], other=0.0,
        )  # fmt: skip
        if DROPS:
            x = tl.where(kept(keys, key, first, threshold, BLOCK_T, BLOCK_K), x, 0.0)
        sums = tl.dot(x, factor, sums, input_precision="ieee")
    target = partial_ptr + (split.to(tl.int64) * T + rows)[:, None] * R + ranks[None, :]
    tl.store(target, sums, mask=row_mask[:, None] & rank_mask[None, :])


@triton.jit(do_not_specialize=["elements", "splits"])
def _sum_kernel(
    partial_ptr, out_ptr, scaled_ptr, stride_out, elements, splits, scale, scaling,
    R: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.range(0, splits, loop_unroll_factor=8):
        total += tl.load(partial_ptr + tl.cast(split, tl.int64) * elements + offs, mask=mask)
    rounded = (total * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs // R * stride_out + offs % R, rounded, mask=mask)
    if SCALES:
        scaled = (rounded.to(tl.float32) * scaling).to(out_ptr.dtype.element_ty)
        tl.store(scaled_ptr + offs, scaled, mask=mask)


@triton.jit(do_not_specialize=["salt", "threshold", "T", "T_split"])
def _gradient_kernel(
    gb_ptr, x_ptr, A_ptr, grad_ptr, partial_ptr, norm_scale_ptr, norm_weight_ptr,
    seed_ptr, salt, threshold, scale,
    stride_gb, stride_x, stride_A, stride_grad, T, K, T_split,
    R: tl.constexpr, BLOCK_R: tl.constexpr, DROPS: tl.constexpr, ADDS: tl.constexpr,
    NORMS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        stride_gb, stride_x = stride_gb // 8 * 8, stride_x // 8 * 8
        stride_A, stride_grad = stride_A // 8 * 8, stride_grad // 8 * 8
    first_column = tl.program_id(0) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    split = tl.program_id(1).to(tl.int64)
    column_mask, rank_mask = columns < K, ranks < R
    small_mask = rank_mask[:, None] & column_mask[None, :]
    if ADDS:
        A = tl.load(A_ptr + ranks[:, None] * stride_A + columns[None, :], mask=small_mask, other=0)
    if NORMS:
        norm_weight = tl.load(norm_weight_ptr + columns, mask=column_mask, other=0.0)
    sums = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for block in range(0, T_split):
        rows = (split * T_split + block) * BLOCK_T + tl.arange(0, BLOCK_T)
        row_mask = rows < T
        mask = row_mask[:, None] & column_mask[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_x + columns[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        if NORMS:
            norm_scale = tl.load(norm_scale_ptr + rows, mask=row_mask, other=0.0)
            normed = x.to(tl.float32) * norm_scale[:, None] * norm_weight[None, :]
            x = normed.to(x.dtype)
        gb_ptrs = gb_ptr + rows[:, None] * stride_gb + ranks[None, :]
        gb = tl.load(gb_ptrs, mask=row_mask[:, None] & rank_mask[None, :], other=0.0)
        if DROPS:
            keys, key = row_keys(seed_ptr, salt, rows)
            stays = kept(keys, key, first_column, threshold, BLOCK_T, BLOCK_K)
            x = tl.where(stays, x, 0.0)
            if ADDS:
                grad_ptrs = grad_ptr + rows[:, None] * stride_grad + columns[None, :]
                grad = tl.load(grad_ptrs, mask=mask, other=0.0)
                product = tl.dot(gb, A, input_precision="ieee") * scale
                grad = (grad.to(tl.float32) + tl.where(stays, product, 0.0)).to(grad.dtype)
                tl.store(grad_ptrs, grad, mask=mask)
        sums = tl.dot(tl.trans(x), gb, sums, input_precision="ieee")
    target = partial_ptr + (split * R + ranks)[:, None] * K + columns[None, :]
    tl.store(target, tl.trans(sums) * scale, mask=small_mask)


def block_ranks(ranks: int) -> int:
    """Return how many ranks a tile has."""
    return max(next_power_of_2(ranks), 16)


def is_aligned(*tensors: Tensor) -> bool:
    """Return whether rows start at 16 bytes, so that they are read by 16 bytes."""
    return all(t.stride(0) % 8 == 0 for t in tensors)


def splits_of(blocks: int, others: int, programs: int = _PROGRAMS) -> tuple[int, int]:
    """Return into how many parts a sum over `blocks` is split, and the blocks of a part.

    Args:
        blocks: Of the dimension that is summed.
        others: Programs for each part.
        programs: Wanted of all parts.
    """
    splits = max(1, min(cdiv(programs, others), cdiv(blocks, 4)))
    each = cdiv(blocks, splits)
    return cdiv(blocks, each), each


def mask_arguments(mask: Mask | None, like: Tensor) -> tuple[Tensor, int, int]:
    """Return seed, salt and threshold; `like` stands in for a seed that nobody reads."""
    return (like, 0, 0) if mask is None else (mask.seed, mask.salt, mask.threshold)


def rank_product_(
    out: Tensor,
    x: Tensor,
    factor: Tensor,
    *,
    mask: Mask | None = None,
    scaling: float | None = None,
) -> Tensor:
    (T, K), R = x.shape, factor.shape[1]
    uses_cublas = mask is None and not _WITHOUT_DROPOUT["product"]
    if uses_cublas or not T or not R:
        torch.mm(x, factor, out=out)
        return out if scaling is None else out * scaling
    if R > MAX_RANKS:
        parts = zip(out.split(MAX_RANKS, 1), factor.split(MAX_RANKS, 1), strict=True)
        scaled = [rank_product_(o, x, f, mask=mask, scaling=scaling) for o, f in parts]
        return out if scaling is None else torch.cat(scaled, 1)
    block_t, block_k, warps, stages = _PRODUCT_TILES[mask is not None]
    if x.element_size() > 2:
        stages = 2  # of shared memory an RTX 4090 has 99 KiB a program
    programs = _PROGRAMS_OF_FEW if T <= FEW_TOKENS else _PROGRAMS
    splits, each = splits_of(cdiv(K, block_k), cdiv(T, block_t), programs)
    partial = torch.empty(splits, T, R, dtype=torch.float32, device=x.device)
    _product_kernel[(cdiv(T, block_t), splits)](
        x, factor, partial, *mask_arguments(mask, partial), x.stride(0), *factor.stride(),
        T, K, each, R=R, BLOCK_R=block_ranks(R), DROPS=mask is not None, ALIGNED=is_aligned(x),
        BLOCK_T=block_t, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return add_splits(partial, out, mask, scaling)


def add_splits(partial: Tensor, out: Tensor, mask: Mask | None, scaling: float | None) -> Tensor:
    """Write the sum over splits `[splits, T, R]` into `out` `[T, R]`; return it scaled."""
    splits, T, R = partial.shape
    scaled = out
    if scaling is not None:
        scaled = torch.empty(T, R, dtype=out.dtype, device=out.device)
    _sum_kernel[(cdiv(T * R, 512),)](
        partial, out, scaled, out.stride(0), T * R, splits, mask.scale if mask else 1.0,
        1.0 if scaling is None else scaling, R=R, SCALES=scaling is not None, BLOCK=512,
    )  # fmt: skip
    return scaled


def rank_gradient(
    gb: Tensor,
    x: Tensor,
    mask: Mask | None = None,
    lora_A: Tensor | None = None,
    grad_x: Tensor | None = None,
    norm: Factors | None = None,
) -> Tensor:
    (T, K), R = x.shape, gb.shape[1]
    if mask is None and norm is None and not _WITHOUT_DROPOUT["gradient"]:
        return product_float32(gb.t(), x)
    if R > MAX_RANKS:
        A_parts = [None] * R if lora_A is None else lora_A.split(MAX_RANKS)
        parts = zip(gb.split(MAX_RANKS, 1), A_parts, strict=False)
        return torch.cat([rank_gradient(g, x, mask, A, grad_x, norm) for g, A in parts])
    if not T or not R:
        return torch.zeros(R, K, dtype=torch.float32, device=x.device)
    block_t, block_k, warps, stages = _GRADIENT_TILES[mask is not None]
    column_blocks = cdiv(K, block_k)
    splits, each = splits_of(cdiv(T, block_t), column_blocks)
    partial = torch.empty(splits, R, K, dtype=torch.float32, device=x.device)
    A = grad = x
    if mask is not None and lora_A is not None and grad_x is not None:
        A, grad = lora_A, grad_x
    _gradient_kernel[(column_blocks, splits)](
        gb, x, A, grad, partial, *((partial, partial) if norm is None else norm),
        *mask_arguments(mask, partial), mask.scale if mask else 1.0,
        gb.stride(0), x.stride(0), A.stride(0), grad.stride(0), T, K, each,
        R=R, BLOCK_R=block_ranks(R), DROPS=mask is not None, ADDS=grad is not x,
        NORMS=norm is not None, ALIGNED=is_aligned(gb, x, A, grad),
        BLOCK_T=block_t, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return partial.sum(0) if splits > 1 else partial[0]
