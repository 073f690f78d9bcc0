"""The masks of `dropout.py`, made in registers by the kernels that read what is dropped."""

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed_ptr, salt, rows):
    """Return `(keys, key)` for `kept`: a uint32 for each of `rows`, and one for all."""
    seed = tl.load(seed_ptr)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    first = _mix(_mix(low + tl.cast(salt, tl.uint32) * 0x9E3779B1) ^ high)
    number = (tl.load(seed_ptr + 1) + rows).to(tl.uint32)
    return first + number * 0x9E3779B1, _mix(first + 0x9E3779B1)


@triton.jit
def kept(keys, key, first_column, threshold, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return where elements of a `[BLOCK_T, BLOCK_K]` tile stay; `first_column` is even."""
    pairs = (first_column // 2 + tl.arange(0, BLOCK_K // 2)).to(tl.uint32)
    x = keys[:, None] + pairs[None, :]
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ key) * 0x846CA68B
    # Both halves are compared where they are, in the upper 16 bits; what lies below breaks no tie.
    limit = tl.cast(threshold, tl.uint32) << 16
    return tl.join((x ^ (x << 16)) >= limit, x >= limit).reshape(BLOCK_T, BLOCK_K)
