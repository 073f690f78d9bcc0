"""Sibling projections multiplied in eight bits: not QLoRA's arithmetic, but a faster one near it.

Shape letters: T tokens, K inputs, N outputs of all siblings together, R their LoRA ranks together,
P columns of a border.

Base weights, activations and gradients are rounded to e4m3 for the two large products of a group,
with LoRA inside them (`kernels/fp8.py`). All that makes the adapters' gradients stays as it is: it
reads activations and gradients as they were before. What `wide` returns here is only the adapters'
two factors; the matrices in eight bits are made where they are multiplied, one for the forward and
one for the backward, unless memory lets them stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from halfbyte.engine.projections import Projection, Siblings
from halfbyte.kernels.fp8 import (
    DTYPE,
    Rows,
    border_columns,
    product_,
    quantize_rows,
    split_border_,
)
from halfbyte.kernels.fp8_weight import factors_, fill_, row_scales

_MULTIPLE = 16


def fits(projections: Sequence[Projection]) -> bool:
    """Whether projections can be multiplied in eight bits: all sizes are multiples of 16."""
    inputs = int(projections[0].weight.shape[1])
    outputs = sum(int(p.weight.shape[0]) for p in projections)
    return inputs % _MULTIPLE == 0 and outputs % _MULTIPLE == 0


@dataclass(frozen=True)
class Fp8Siblings(Siblings):
    """Projections of one input, multiplied in eight bits."""

    @cached_property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Of the rows of the weights, and of those of their transpose."""
        return row_scales(self.projections)

    def wide(self, like: Tensor) -> Tensor:
        """Return the adapters' factors, A `[R, K]` then B `[N, R]`, as one vector."""
        wide = like.new_empty(self.rank * (self.inputs + self.outputs))
        if self.rank:
            factors_(self.lora_A(wide), self.lora_B(wide), self.projections)
        return wide

    def wide_again(self, like: Tensor) -> Tensor:
        """Return what `wide` returned in the forward."""
        return self.wide(like)

    def lora_A(self, wide: Tensor) -> Tensor:  # noqa: N802
        """Return all A, one below the other: `[R, K]`."""
        return wide[: self.rank * self.inputs].view(self.rank, self.inputs)

    def lora_B(self, wide: Tensor) -> Tensor:  # noqa: N802
        """Return all B, scaled, each in its own rows and columns: `[N, R]`."""
        return wide[self.rank * self.inputs :].view(self.outputs, self.rank)

    def forward(self, x_wide: Tensor, wide: Tensor, out: Tensor) -> Tensor:
        """Write all siblings' outputs into `out` `[T, N]` and return it."""
        weight, balance = self._matrix(wide, transposed=False)
        product_(quantize_rows(x_wide, self.inputs, balance), weight, out)
        return self.add_bias_(out)

    def backward_input(self, grad_wide: Tensor, wide: Tensor, seed: Tensor | None) -> Tensor:
        """Return the gradient of x `[T, K]`; see `Siblings.backward_input`."""
        weight, balance = self._matrix(wide, transposed=True)
        without_lora = self.mask(seed) is not None
        grad = quantize_rows(grad_wide, self.outputs, None if without_lora else balance)
        return product_(grad, weight, grad_wide.new_empty(grad_wide.shape[0], self.inputs))

    def _matrix(self, wide: Tensor, *, transposed: bool) -> tuple[Rows, Tensor | None]:
        """Return the weights with LoRA's factor in their border, and the factor's balance."""
        scale = self.scales[transposed]
        values = self.stay.transposed if transposed else self.stay.matrix
        if values is None:
            rows, columns = self.outputs, self.inputs
            if transposed:
                rows, columns = columns, rows
            values = wide.new_empty(rows, columns + border_columns(self.rank), dtype=DTYPE)
            fill_(values, self.projections, scale, transposed=transposed)
            self._let_stay(values, transposed=transposed)
        balance = None
        if self.rank:
            factor = self.lora_A(wide).t() if transposed else self.lora_B(wide)
            balance = split_border_(values, factor, scale)
        return Rows(values, scale), balance

    def _let_stay(self, values: Tensor, *, transposed: bool) -> None:
        # While a graph is recorded nothing is computed: who read the matrix before the graph runs
        # would find nothing in it.
        is_recording = values.is_cuda and torch.cuda.is_current_stream_capturing()
        if not self.stay.granted or is_recording:
            return
        if transposed:
            self.stay.transposed = values
        else:
            self.stay.matrix = values
