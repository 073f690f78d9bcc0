"""Fill the wide matrix of sibling projections: 4-bit weights in the middle, LoRA in the border.

See `engine/projections.py` for the drawing. Rows of the wide matrix have a pitch, so these kernels
write into views that are not contiguous.
"""

from typing import Protocol

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated
from halfbyte.kernels.nf4 import dequantize_4bit, dequantize_nested


class Quantized(Protocol):
    """The tensors of a 4-bit weight (`quant.weight.QuantizedWeight` is one)."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    quant_type: str


@accelerated
def fill_weight_(block: Tensor, weight: Quantized) -> Tensor:
    """Dequantize `weight` into `block` `[N, K]`, whose rows may have a pitch, and return it."""
    settings = {"block_size": weight.block_size, "quant_type": weight.quant_type}
    if weight.nested_absmax is None:
        dense = dequantize_4bit(
            weight.packed, weight.absmax, shape=weight.shape, dtype=weight.dtype, **settings
        )
    else:
        dense = dequantize_nested(
            weight.packed, weight.absmax, weight.nested_absmax, weight.nested_map, weight.offset,
            shape=weight.shape, dtype=weight.dtype, **settings,
        )  # fmt: skip
    return block.copy_(dense)


@accelerated
def fill_border_(
    wide: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    *,
    rows: tuple[int, int],
    column: int,
    inputs: int,
    outputs: int,
) -> Tensor:
    """Write one sibling's adapter into the border of `wide` `[N + R, K + R]` and return it.

    Args:
        wide: The matrix to fill.
        lora_A: `[r, K]` float32 or None; goes, times `scaling`, into the rows below N.
        lora_B: `[N_i, r]` float32 or None; goes beside its own rows, with zeros around it.
        scaling: The adapter's scale.
        rows: First row and number of rows of this sibling.
        column: First border column of this sibling.
        inputs: K.
        outputs: N.
    """
    row, count = rows
    wide[row : row + count, inputs:] = 0
    if lora_A is not None and lora_B is not None:
        rank = lora_A.shape[0]
        below = outputs + column - inputs
        wide[below : below + rank, :inputs] = (lora_A.detach() * scaling).to(wide.dtype)
        wide[row : row + count, column : column + rank] = lora_B.detach().to(wide.dtype)
    return wide
