"""Products of a few tokens with sibling 4-bit weights, for decoding: what stands around included.

Shape letters: T tokens (1 for one sequence), K inputs, N outputs of all siblings together, G
siblings, r their LoRA rank.

    y = f(x) W^T + b + s (f(x) A^T) B^T + residual

f is a norm, the gated activation, the join of parts of attention, or nothing. With few tokens the
time is that of reading the codes once, so codes and both levels of scales become numbers in
registers, sums are float32, and nothing else is written but y.
"""

from torch import Tensor

from halfbyte.kernels.dispatch import accelerated
from halfbyte.kernels.matvec_4bit_parts import Before, Group
from halfbyte.kernels.matvec_4bit_tokens import several_tokens


@accelerated
def matvec_4bit(
    x: Tensor, group: Group, *, before: Before | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return `y`, `[T, N]` in the dtype of f(x).

    Args:
        x: `[T, K]` (`[T, 2 K]` where `before` is a gate, `[T, K P]` where P parts are joined),
            contiguous.
        group: The siblings.
        before: f; its result is rounded to the dtype of x, or what a join says.
        residual: `[T, N]`, or None.
    """
    return several_tokens(x, group, before, residual)
