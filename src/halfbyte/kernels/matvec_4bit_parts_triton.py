"""What the decoding products on CUDA share: siblings, scales, and what stands before a product."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sibling_of(
    tile, N0, N1, N2,
    packed0, absmax0, nested0, map0, offset0,
    packed1, absmax1, nested1, map1, offset1,
    packed2, absmax2, nested2, map2, offset2,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Return the sibling that a tile belongs to, its place and first output, and its tensors."""
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
    return sibling, tile, first, N, packed, absmax, nested, nested_map, offset


@triton.jit
def scales(absmax, nested, nested_map, offset, blocks, mask, NESTED: tl.constexpr):
    """Return what the levels of these blocks are multiplied with."""
    if NESTED:
        code = tl.load(absmax + blocks, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested + blocks // 256, mask=mask, other=0.0)
        scale = tl.load(nested_map + code) * scale + offset
    else:
        scale = tl.load(absmax + blocks, mask=mask, other=0.0)
    return scale


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Return act(x) of float32."""
    if ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    else:  # tanh(z) = 2 sigmoid(2 z) - 1
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * z))
    return y


@triton.jit
def before_product(x, norm, scale, at, mask, K: tl.constexpr, BEFORE: tl.constexpr):
    """Return f(x) at these inputs, rounded to the dtype of x, as float32."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if BEFORE == "norm":
        value = value * scale * tl.load(norm + at, mask=mask, other=0.0)
    elif BEFORE != "":
        up = tl.load(x + K + at, mask=mask, other=0.0).to(tl.float32)
        value = activate(value, BEFORE) * up
    return value.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def norm_scale(x, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    """Return `rsqrt(mean(x^2) + eps)`."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        value = tl.load(x + start + offs, mask=start + offs < K, other=0.0).to(tl.float32)
        total += value * value
    return tl.rsqrt(tl.sum(total, 0) / K + eps)


def weights_of(group, absent: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
    """Return the tensors of up to three weights, codes as words of this type, and their rows."""
    pointers, rows = [], []
    for i in range(3):
        weight = group.weights[i if i < len(group.weights) else 0]
        levels = (weight.nested_absmax, weight.nested_map, weight.offset)
        pointers += [weight.packed.view(-1).view(dtype), weight.absmax]
        pointers += levels if weight.nested_absmax is not None else (absent,) * 3
        rows.append(weight.shape[0] if i < len(group.weights) else 0)
    return pointers, rows
