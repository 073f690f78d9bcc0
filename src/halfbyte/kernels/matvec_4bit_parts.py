"""What decoding products are made of: siblings of one input, and what is applied before them.

Shape letters: T tokens, K inputs, N outputs of all siblings together, G siblings, r their rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.decode_attention import Join, join
from halfbyte.kernels.gated import gated_forward
from halfbyte.kernels.linear_4bit import PackedMatrix
from halfbyte.kernels.nf4 import dequantize_4bit, dequantize_nested
from halfbyte.kernels.rms_norm import Norm, add_rms_norm


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input.

    Args:
        weights: 4-bit or dense, `[N_i, K]` each.
        lora_A: `[G * r, K]`, siblings of a smaller rank filled up with zeros; or None.
        lora_B: `[N, r]`, already times the scaling; or None.
        bias: `[N]`, zeros for siblings without one; or None.
    """

    weights: tuple[PackedMatrix | Tensor, ...]
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Gate:
    """`act(gate) * up` before the product, where x is `[T, 2 K]`: "silu" or "gelu_tanh"."""

    activation: str


Before = Norm | Gate | Join
"""What stands before a product."""


def before_product(x: Tensor, before: Before | None) -> Tensor:
    """Return f(x), `[T, K]` in the dtype of x, or of what is joined."""
    if isinstance(before, Join):
        return join(x, before)
    if isinstance(before, Norm):
        return add_rms_norm(x, None, before.weight, before.eps)[1]
    if isinstance(before, Gate):
        return gated_forward(x, x.shape[1] // 2, before.activation)
    return x


def dense(weight: PackedMatrix | Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight `[N_i, K]` that can be multiplied with x of this dtype."""
    if isinstance(weight, Tensor):
        return weight
    shape, block_size, quant_type = weight.shape, weight.block_size, weight.quant_type
    if weight.nested_absmax is None or weight.nested_map is None or weight.offset is None:
        return dequantize_4bit(
            weight.packed, weight.absmax,
            shape=shape, dtype=dtype, block_size=block_size, quant_type=quant_type,
        )  # fmt: skip
    return dequantize_nested(
        weight.packed, weight.absmax, weight.nested_absmax, weight.nested_map, weight.offset,
        shape=shape, dtype=dtype, block_size=block_size, quant_type=quant_type,
    )  # fmt: skip
