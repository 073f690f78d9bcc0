"""Dropout whose mask is a function of a seed, so that it is made again instead of kept.

Shape letters: T tokens, K features, R LoRA ranks. Whether an element stays is a pure function of
(seed, salt, row, column): two neighbouring columns share one 32-bit hash of a counter, 16 bits
each, which are compared with p. The hash is two rounds of multiply and xorshift ("lowbias32", C.
Wellons, https://nullprogram.com/blog/2018/07/31/) with half of the key between them: fast enough
that kernels which read x at the memory's speed can make the mask on the way.

The seed lies on the device, so that a CUDA graph replays with a new one. With it lies the number of
the first row: a batch that is cut in two drops what it would have dropped whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a batch start so far apart (2^32 / golden ratio, odd) that counters of two rows do not
# meet: up to 29,000 pairs of columns within 65,536 rows.
GOLDEN = 0x9E3779B1
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_WORD, _HALF = 0xFFFFFFFF, 0xFFFF
_STEPS = 1 << 16


class Mask(NamedTuple):
    """Which elements are dropped.

    Args:
        p: Probability, in [0, 1). It is rounded to a multiple of 2^-16: 0.05 becomes 0.0500031,
            below 2^-17 nothing is dropped.
        seed: int64 `[2]` on the device: the seed, and the number of the first row.
        salt: Tells the places of a model apart that share a seed.
    """

    p: float
    seed: Tensor
    salt: int

    @property
    def threshold(self) -> int:
        """An element is dropped where its 16 bits are below this."""
        return min(round(self.p * _STEPS), _STEPS - 1)

    @property
    def scale(self) -> float:
        """What stays is multiplied by this: one over the exact probability of staying."""
        return _STEPS / (_STEPS - self.threshold)


def _mix(x: Tensor) -> Tensor:
    """Return a hash of `x`, int64 that holds 32 bits."""
    x = (x ^ (x >> 16)) * _FIRST & _WORD
    x = (x ^ (x >> 15)) * _SECOND & _WORD
    return x ^ (x >> 16)


def _dropped(mask: Mask, rows: int, columns: int) -> Tensor:
    """Return bool `[rows, columns]`: where an element goes."""
    device = mask.seed.device
    seed, first_row = mask.seed.unbind()
    first = _mix(_mix((seed & _WORD) + mask.salt * GOLDEN & _WORD) ^ (seed >> 32 & _WORD))
    key = _mix(first + GOLDEN & _WORD)
    row = first_row + torch.arange(rows, device=device)
    pair = torch.arange(-(-columns // 2), device=device, dtype=torch.int32)
    # From here on int32, which wraps around as uint32 does; its shifts leave copies of the sign.
    bits = (first + row * GOLDEN).to(torch.int32)[:, None] + pair
    bits ^= (bits >> 16).bitwise_and_(_HALF)
    bits *= _FIRST
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits ^= key.to(torch.int32)
    bits *= _SECOND - (1 << 32)
    bits ^= (bits >> 16).bitwise_and_(_HALF)
    # The lower half is the left column, as bytes lie in memory; signs are turned to compare halves
    # as if they had none.
    bits ^= 0x80008000 - (1 << 32)
    return bits.view(torch.int16)[:, :columns] < mask.threshold - _STEPS // 2


def kept(mask: Mask, rows: int, columns: int) -> Tensor:
    """Return bool `[rows, columns]` on the device of the mask's seed: where an element stays."""
    return ~_dropped(mask, rows, columns)


def dropout(x: Tensor, mask: Mask) -> Tensor:
    """Return `x` `[T, K]` (any floating dtype) with elements zeroed and the others scaled."""
    return (x * mask.scale).masked_fill_(_dropped(mask, *x.shape), 0)


def add_masked_product_(grad_x: Tensor, gb: Tensor, lora_A: Tensor, mask: Mask) -> Tensor:
    """Add the gradient through dropout, `dropout(gb @ lora_A)`, to `grad_x` and return it.

    Args:
        grad_x: `[T, K]`.
        gb: `[T, R]`, scaled `dy B`.
        lora_A: `[R, K]`.
        mask: That of the forward.
    """
    grad_x += dropout(gb @ lora_A, mask)
    return grad_x
