"""The two products with a packed weight, `x W^T` and `g W`, each as one op that keeps no dense W.

They are ops of their own, and not `dequantize` followed by a matrix product, because of
`torch.compile`: it merges equal calls of the forward and the backward, and would keep every
dequantized matrix between them.

Shape letters: T rows, I in features, O out features.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.kernels.nf4 import dequantize_4bit, dequantize_nested
from halfbyte.kernels.registry import register_op


class PackedMatrix(Protocol):
    """The tensors of a 4-bit weight `[O, I]` (`quant.weight.QuantizedWeight` is one)."""

    @property
    def packed(self) -> Tensor:
        """The uint8 codes."""

    @property
    def absmax(self) -> Tensor:
        """The scales, float32, or uint8 with double quantization."""

    @property
    def nested_absmax(self) -> Tensor | None:
        """The scales of the scales."""

    @property
    def nested_map(self) -> Tensor | None:
        """The levels of the scales."""

    @property
    def offset(self) -> Tensor | None:
        """What was taken off the scales."""

    @property
    def shape(self) -> torch.Size:
        """`(O, I)`."""

    @property
    def block_size(self) -> int:
        """Weights that share one scale."""

    @property
    def quant_type(self) -> str:
        """`nf4` or `fp4`."""


def linear_4bit(x_TI: Tensor, weight: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """Return `x W^T + b`, `[T, O]` in the dtype of x. No gradient: callers have their own."""
    return torch.ops.halfbyte.linear_4bit(
        x_TI,
        bias,
        weight.packed,
        _scales(weight),
        weight.shape,
        weight.block_size,
        weight.quant_type,
    )


def grad_input_4bit(grad_TO: Tensor, weight: PackedMatrix) -> Tensor:
    """Return `g W`, `[T, I]` in the dtype of g: the gradient of `x W^T` with respect to x."""
    return torch.ops.halfbyte.grad_input_4bit(
        grad_TO, weight.packed, _scales(weight), weight.shape, weight.block_size, weight.quant_type
    )


def _scales(weight: PackedMatrix) -> list[Tensor]:
    nested = (weight.nested_absmax, weight.nested_map, weight.offset)
    return [weight.absmax, *(scale for scale in nested if scale is not None)]


def _dense(
    packed: Tensor,
    scales: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    quant_type: str,
) -> Tensor:
    dequantize = dequantize_4bit if len(scales) == 1 else dequantize_nested
    return dequantize(
        packed, *scales, shape=shape, dtype=dtype, block_size=block_size, quant_type=quant_type
    )


def reference_linear_4bit(
    x_TI: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    scales: Sequence[Tensor],
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
) -> Tensor:
    """Dequantize, then multiply."""
    return F.linear(x_TI, _dense(packed, scales, shape, x_TI.dtype, block_size, quant_type), bias)


def reference_grad_input_4bit(
    grad_TO: Tensor,
    packed: Tensor,
    scales: Sequence[Tensor],
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
) -> Tensor:
    """Dequantize, then multiply."""
    return grad_TO @ _dense(packed, scales, shape, grad_TO.dtype, block_size, quant_type)


def _fake_linear_4bit(
    x_TI: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    scales: Sequence[Tensor],
    shape: Sequence[int],
    *_: object,
) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], shape[0])


def _fake_grad_input_4bit(
    grad_TO: Tensor, packed: Tensor, scales: Sequence[Tensor], shape: Sequence[int], *_: object
) -> Tensor:
    return grad_TO.new_empty(grad_TO.shape[0], shape[1])


_WEIGHT = "Tensor packed, Tensor[] scales, SymInt[] shape, int block_size, str quant_type"

register_op(
    f"linear_4bit(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor",
    reference_linear_4bit,
    _fake_linear_4bit,
    module=__name__,
)
register_op(
    f"grad_input_4bit(Tensor grad, {_WEIGHT}) -> Tensor",
    reference_grad_input_4bit,
    _fake_grad_input_4bit,
    module=__name__,
)
