"""Dropout whose mask is a function of a seed, so that it is made again instead of kept.

Shape letters: T tokens, K features, R LoRA ranks. The seed lies on the device, so that a CUDA graph
replays with a new one. With it lies the number of the first row: a batch that is cut in two drops
what it would have dropped whole.

    dropout            xd = mask(x) / (1 - p)                     what LoRA's A reads
    add_masked_product_  dx += mask(g A) / (1 - p)                what A's input gets back
"""

from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated

# An odd constant, so that neighbouring salts have seeds that are far apart.
SALT_FACTOR = 0x3C6EF373


class Mask(NamedTuple):
    """Which elements are dropped.

    Args:
        p: Probability, in [0, 1).
        seed: int64 `[2]` on the device: the seed, and the number of the first row.
        salt: Tells the places of a model apart that share a seed.
    """

    p: float
    seed: Tensor
    salt: int


def _scaled(mask: Mask, like: Tensor) -> Tensor:
    """Return 0 where an element is dropped and 1 / (1 - p) elsewhere."""
    seed, first_row = mask.seed.tolist()
    generator = torch.Generator(like.device)
    generator.manual_seed((seed + mask.salt * SALT_FACTOR) % 2**63)
    shape = (first_row + like.shape[0], like.shape[1])
    kept = torch.rand(shape, generator=generator, device=like.device)[first_row:] >= mask.p
    return kept.to(like.dtype) / (1.0 - mask.p)


@accelerated
def dropout(x: Tensor, mask: Mask) -> Tensor:
    """Return `x` `[T, K]` (any floating dtype; rows may have a pitch) with elements zeroed."""
    return x * _scaled(mask, x)


@accelerated
def add_masked_product_(grad_x: Tensor, gb: Tensor, lora_A: Tensor, mask: Mask) -> Tensor:
    """Add `mask(gb @ lora_A) / (1 - p)` to `grad_x` and return it.

    Args:
        grad_x: `[T, K]`, contiguous.
        gb: `[T, R]`, scaled `dy B` (rows may have a pitch).
        lora_A: `[R, K]` (rows may have a pitch).
        mask: That of the forward.
    """
    grad_x += (gb @ lora_A) * _scaled(mask, grad_x)
    return grad_x
