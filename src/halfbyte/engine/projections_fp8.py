"""Sibling projections multiplied in eight bits: not QLoRA's arithmetic, but a faster one near it.

Shape letters: T tokens, K inputs, N outputs of all siblings together, R their LoRA ranks together,
P columns of a border.

Base weights, activations and gradients are rounded to e4m3 for the two large products of a group,
with LoRA inside them (`kernels/fp8.py`). All that makes the adapters' gradients stays as it is: it
reads activations and gradients as they were before. What `wide` returns here is only the adapters'
two factors; the matrices in eight bits are made where they are multiplied, one for the forward and
one for the backward. Where memory lets them stay, `wide` writes the factors into both, and the
backward finds all as the forward left it.
"""

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.engine.projections import Projection, Siblings
from halfbyte.errors import ConfigError
from halfbyte.kernels.fp8 import (
    DTYPE,
    Rows,
    border_columns,
    factor_bytes,
    product_,
    quantize_rows,
    split_borders_,
)
from halfbyte.kernels.fp8_weight import factors_, fill_, row_scales

_log = logging.getLogger(__name__)

_CAPABILITY = (8, 9)
# Of both sizes of a matrix: rows are read by 16 bytes.
_MULTIPLE = 16


def require_fp8(device: torch.device) -> None:
    """Check that a device multiplies e4m3 numbers.

    Raises:
        ConfigError: it is no GPU, or one before Ada and Hopper.
    """
    found = str(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= _CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name(device)}, {capability[0]}.{capability[1]}"
    raise ConfigError(
        f"compute: fp8 needs a GPU of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or "
        f"more (Ada, Hopper, Blackwell), got {found}",
        hint="leave compute at bf16",
    )


def require_bfloat16(dtype: torch.dtype) -> None:
    """Check a model's dtype: products of rows with scales of their own come in one only.

    Raises:
        ConfigError: it is another than bfloat16.
    """
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"compute: fp8 needs a model that is loaded in bfloat16, got {dtype}",
            hint="set dtype: bfloat16, or leave compute at bf16",
        )


def fp8_siblings(projections: tuple[Projection, ...], dropout: float, salt: int) -> Siblings:
    """Return projections of one input, in eight bits where their sizes are multiples of 16."""
    group = Fp8Siblings(projections, dropout, salt)
    if group.inputs % _MULTIPLE == 0 and group.outputs % _MULTIPLE == 0:
        return group
    _warn_of_sizes(group.outputs, group.inputs)
    return Siblings(projections, dropout, salt)


@functools.cache
def _warn_of_sizes(outputs: int, inputs: int) -> None:
    _log.warning(
        "projections of %d to %d features stay in 16 bits: compute: fp8 needs multiples of %d",
        inputs, outputs, _MULTIPLE,
    )  # fmt: skip


@dataclass(frozen=True)
class Fp8Siblings(Siblings):
    """Projections of one input, multiplied in eight bits."""

    @functools.cached_property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Of the rows of the weights, and of those of their transpose."""
        return row_scales(self.projections)

    @property
    def row_bytes(self) -> int:
        """The longer of what both products read, in eight bits, with its scale."""
        return max(self.inputs, self.outputs) + border_columns(self.rank) + 4

    def passing_bytes(self, itemsize: int) -> int:
        """Return what the factors and the larger of both matrices take."""
        return self._factor_bytes(itemsize) + max(self._matrix_bytes)

    def staying_bytes(self, itemsize: int) -> int:
        """Return what the factors and both matrices take."""
        return self._factor_bytes(itemsize) + sum(self._matrix_bytes)

    def _factor_bytes(self, itemsize: int) -> int:
        return factor_bytes(self.inputs, self.outputs, self.rank, itemsize)

    @property
    def _matrix_bytes(self) -> tuple[int, int]:
        columns = border_columns(self.rank)
        forward = self.outputs * (self.inputs + columns)
        return forward, self.inputs * (self.outputs + columns)

    def wide(self, like: Tensor) -> Tensor:
        """Return the adapters' factors, A `[R, K]` then B `[N, R]` then balances, as one vector."""
        wide, size = self.stay.factors, like.element_size()
        if wide is None:
            wide = like.new_empty(self._factor_bytes(size) // size)
        if self.rank:
            both, balances = (self.lora_A(wide), self.lora_B(wide)), self._balances(wide)
            factors_(*both, balances, self.projections, self.scales)
            if wide is self.stay.factors:
                split_borders_(balances, self._staying_matrices, (both[1], both[0].t()))
        return wide

    def wide_again(self, like: Tensor) -> Tensor:
        """Return what `wide` returned in the forward."""
        return self.wide(like) if self.stay.factors is None else self.stay.factors

    def lora_A(self, wide: Tensor) -> Tensor:  # noqa: N802
        """Return all A, one below the other: `[R, K]`."""
        return wide[: self.rank * self.inputs].view(self.rank, self.inputs)

    def lora_B(self, wide: Tensor) -> Tensor:  # noqa: N802
        """Return all B, scaled, each in its own rows and columns: `[N, R]`."""
        start = self.rank * self.inputs
        return wide[start : start + self.rank * self.outputs].view(self.outputs, self.rank)

    def _balances(self, wide: Tensor) -> Tensor:
        """Return the balances of B and of A, float32 `[2]`."""
        return wide[self.rank * (self.inputs + self.outputs) :].view(torch.float32)

    def forward(
        self, x_wide: Tensor, wide: Tensor, out: Tensor, beside: Tensor | None = None
    ) -> Tensor:
        """Write all siblings' outputs into `out` `[T, N]`, added to `beside`, and return it."""
        self._forward(x_wide[:, : self.inputs], x_wide[:, self.inputs :], wide, out)
        return out if beside is None else out.add_(beside)

    def forward_alone(
        self, x: Tensor, wide: Tensor, seed: Tensor | None, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `Siblings.forward_alone` returns, without a copy of `x`."""
        border = x.new_empty(x.shape[0], self.rank)
        xa = self._down(x, border, wide, seed)
        return self._forward(x, border, wide, out), xa

    def _forward(self, x: Tensor, border: Tensor, wide: Tensor, out: Tensor) -> Tensor:
        weight, balance = self._matrix(wide, transposed=False)
        product_(quantize_rows(x, border, balance), weight, out)
        return self.add_bias_(out)

    def backward_input(self, grad_wide: Tensor, wide: Tensor, seed: Tensor | None) -> Tensor:
        """Return the gradient of x `[T, K]`; see `Siblings.backward_input`."""
        weight, balance = self._matrix(wide, transposed=True)
        without_lora = self.mask(seed) is not None
        grad, border = grad_wide[:, : self.outputs], grad_wide[:, self.outputs :]
        rows = quantize_rows(grad, border, None if without_lora else balance)
        return product_(rows, weight, grad.new_empty(grad.shape[0], self.inputs))

    def _matrix(self, wide: Tensor, *, transposed: bool) -> tuple[Rows, Tensor | None]:
        """Return the weights with LoRA's factor in their border, and the factor's balance."""
        scale = self.scales[transposed]
        balance = self._balances(wide)[int(transposed) :][:1] if self.rank else None
        values = self.stay.transposed if transposed else self.stay.matrix
        if values is None:
            rows, columns = self.outputs, self.inputs
            if transposed:
                rows, columns = columns, rows
            values = wide.new_empty(rows, columns + border_columns(self.rank), dtype=DTYPE)
            fill_(values, self.projections, scale, transposed=transposed)
        matrix = Rows(values, scale)
        if balance is not None and wide is not self.stay.factors:
            factor = self.lora_A(wide).t() if transposed else self.lora_B(wide)
            split_borders_(balance, [matrix], [factor])
        self._let_stay(values, wide, transposed=transposed)
        return matrix, balance

    def _let_stay(self, values: Tensor, wide: Tensor, *, transposed: bool) -> None:
        # While a graph is recorded nothing is computed: who read the matrix before the graph runs
        # would find nothing in it.
        is_recording = values.is_cuda and torch.cuda.is_current_stream_capturing()
        if not self.stay.granted or is_recording:
            return
        if not transposed:
            self.stay.matrix = values
            return
        self.stay.transposed = values
        if self.stay.matrix is not None and self.stay.factors is None:
            # They stand in its border, too, since the forward.
            self.stay.factors = wide

    @property
    def _staying_matrices(self) -> list[Rows]:
        tensors = (self.stay.matrix, self.stay.transposed)
        return [Rows(m, s) for m, s in zip(tensors, self.scales, strict=True) if m is not None]
