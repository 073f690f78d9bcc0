"""The wide matrix of sibling projections: 4-bit weights in the middle, LoRA in the border.

            K columns        R columns
        ┌────────────────┬─────────────┐
        │ W_q            │ B_q         │
      N │ W_k            │     B_k     │        B scaled by alpha / r, zeros around it
        │ W_v            │         B_v │
        ├────────────────┼─────────────┤
      R │ A_q A_k A_v    │ (not used)  │
        └────────────────┴─────────────┘

`engine/projections.py` says what it is for.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated
from halfbyte.kernels.nf4 import dequantize_4bit, dequantize_nested


class Quantized(Protocol):
    """The tensors of a 4-bit weight (`quant.weight.QuantizedWeight` is one)."""

    @property
    def packed(self) -> Tensor: ...  # noqa: D102
    @property
    def absmax(self) -> Tensor: ...  # noqa: D102
    @property
    def nested_absmax(self) -> Tensor | None: ...  # noqa: D102
    @property
    def nested_map(self) -> Tensor | None: ...  # noqa: D102
    @property
    def offset(self) -> Tensor | None: ...  # noqa: D102
    @property
    def shape(self) -> torch.Size: ...  # noqa: D102
    @property
    def block_size(self) -> int: ...  # noqa: D102
    @property
    def quant_type(self) -> str: ...  # noqa: D102


class Part(Protocol):
    """One sibling: its weight `[N_i, K]` and its adapter, `A [r, K]` and `B [N_i, r]`, or None."""

    @property
    def weight(self) -> Quantized | Tensor: ...  # noqa: D102
    @property
    def lora_A(self) -> Tensor | None: ...  # noqa: D102, N802
    @property
    def lora_B(self) -> Tensor | None: ...  # noqa: D102, N802
    @property
    def scaling(self) -> float: ...  # noqa: D102


@accelerated
def assemble_(wide: Tensor, parts: Sequence[Part], *, only_border: bool = False) -> Tensor:
    """Fill `wide` `[N + R, K + R]` from its parts, rounding to its dtype, and return it.

    The corner of R rows and R columns is left as it is. R may exceed the sum of the ranks; the
    columns and rows beyond them become zeros. With `only_border`, the weights in the middle are
    left as they are too: adapters change from step to step, weights do not.
    """
    outputs = sum(part.weight.shape[0] for part in parts)
    inputs = parts[0].weight.shape[1]
    wide[:outputs, inputs:] = 0
    row = rank = 0
    for part in parts:
        rows = slice(row, row + part.weight.shape[0])
        if not only_border:
            wide[rows, :inputs] = dense(part.weight, wide.dtype)
        row = rows.stop
        if part.lora_A is not None and part.lora_B is not None:
            columns = slice(inputs + rank, inputs + rank + part.lora_A.shape[0])
            wide[rows, columns] = part.lora_B.detach() * part.scaling
            rank += part.lora_A.shape[0]
            wide[outputs + columns.start - inputs : outputs + rank, :inputs] = part.lora_A.detach()
    wide[outputs + rank :, :inputs] = 0
    return wide


def dense(weight: Quantized | Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight's values: dequantized to `dtype`, or as they are where it is not quantized.

    For float64 they are float32.
    """
    if isinstance(weight, Tensor):
        return weight
    block_size, quant_type = weight.block_size, weight.quant_type
    dtype = torch.float32 if dtype == torch.float64 else dtype
    if weight.nested_absmax is None or weight.nested_map is None or weight.offset is None:
        return dequantize_4bit(
            weight.packed, weight.absmax,
            shape=weight.shape, dtype=dtype, block_size=block_size, quant_type=quant_type,
        )  # fmt: skip
    return dequantize_nested(
        weight.packed, weight.absmax, weight.nested_absmax, weight.nested_map, weight.offset,
        shape=weight.shape, dtype=dtype, block_size=block_size, quant_type=quant_type,
    )  # fmt: skip
