"""Products of a few tokens with sibling 4-bit weights, for decoding: what stands around included.

Shape letters: T tokens (1 for one sequence), K inputs, N outputs of all siblings together, G
siblings, r their LoRA rank.

    y = f(x) W^T + b + s (f(x) A^T) B^T + residual

f is a norm, the gated activation, or nothing. With few tokens the time is that of reading the codes
once, so codes and both levels of scales become numbers in registers, sums are float32, and nothing
else is written but y.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated
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


@accelerated
def matvec_4bit(
    x: Tensor, group: Group, *, before: Norm | Gate | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return `y`, `[T, N]` in the dtype of x.

    Args:
        x: `[T, K]` (`[T, 2 K]` where `before` is a gate), contiguous.
        group: The siblings.
        before: f; its result is rounded to the dtype of x.
        residual: `[T, N]`, or None.
    """
    wide_type = torch.promote_types(x.dtype, torch.float32)
    x = apply_before(x, before)
    y = torch.cat([x @ dense(weight, x.dtype).t() for weight in group.weights], 1).to(wide_type)
    if group.lora_A is not None and group.lora_B is not None:
        xa = (x @ group.lora_A.t()).to(wide_type).unflatten(1, (len(group.weights), -1))
        sizes = [int(weight.shape[0]) for weight in group.weights]
        lora_B = group.lora_B.to(wide_type).split(sizes)
        y += torch.cat([xa[:, i] @ lora_B[i].t() for i in range(len(sizes))], 1)
    if group.bias is not None:
        y += group.bias
    if residual is not None:
        y += residual
    return y.to(x.dtype)


def apply_before(x: Tensor, before: Norm | Gate | None) -> Tensor:
    """Return f(x), `[T, K]` in the dtype of x."""
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
