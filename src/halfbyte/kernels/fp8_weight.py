"""The weights of sibling projections in eight bits, made from their four, and LoRA's two factors.

Shape letters: N outputs of all siblings, K inputs, R their LoRA ranks, P columns of a border.

Hopper multiplies e4m3 numbers only where both sides lie along what is summed. So there are two
matrices where bfloat16 has one, each with a scale a row and room for LoRA (`kernels/fp8.py`):

    forward     [N, K + P]    W
    backward    [K, N + P]    W^T

The scales never change: they are found once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated
from halfbyte.kernels.fp8 import DTYPE, LARGEST, balance_of
from halfbyte.kernels.wide import Part, dense

# Rows that are smaller than the largest by more are scaled as if they were not: LoRA may add to
# rows of zeros, too.
_SPREAD = 2.0**-8


def row_scales(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Return the scales of the rows of W, float32 `[N]`, and of those of its transpose, `[K]`."""
    outputs, inputs = zip(*map(_largest, parts), strict=True)
    return _scale(torch.cat(outputs)), _scale(torch.stack(inputs).amax(0))


def _largest(part: Part) -> tuple[Tensor, Tensor]:
    # Of its own, so that one part's weights are gone before the next part's are there.
    weight = dense(part.weight, torch.bfloat16)
    rows, columns = (torch.linalg.vector_norm(weight, torch.inf, dim=dim) for dim in (1, 0))
    return rows, columns


def _scale(largest: Tensor) -> Tensor:
    whole = largest.max()
    whole = torch.where(whole > 0, whole, 1.0)
    return torch.maximum(largest, whole * _SPREAD).to(torch.float32) / LARGEST


@accelerated
def fill_(values: Tensor, parts: Sequence[Part], scale: Tensor, *, transposed: bool) -> Tensor:
    """Write the weights of all parts into `values`, but for its border, and return it.

    Args:
        values: e4m3 `[N, K + P]`, or with `transposed` `[K, N + P]`.
        parts: The siblings.
        scale: float32, one a row of `values`.
        transposed: Which of the two it is.
    """
    start = 0
    for part in parts:
        weight = dense(part.weight, torch.float32)
        end = start + weight.shape[0]
        if transposed:
            values[:, start:end] = (weight.t() / scale.unsqueeze(1)).to(DTYPE)
        else:
            values[start:end, : weight.shape[1]] = (weight / scale[start:end, None]).to(DTYPE)
        start = end
    return values


@accelerated
def factors_(
    lora_A: Tensor,
    lora_B: Tensor,
    balances: Tensor,
    parts: Sequence[Part],
    scales: tuple[Tensor, Tensor],
) -> None:
    """Write the adapters of all parts into two matrices, as `kernels/wide.py` has its border.

    Args:
        lora_A: `[R, K]`, all A one below the other; zeros after the last.
        lora_B: `[N, R]`, each B times its scaling in its own rows and columns, zeros around.
        balances: float32 `[2]`, of B in the forward's matrix, of A^T in the backward's.
        parts: The siblings.
        scales: Of the rows of both matrices, `[N]` and `[K]`.
    """
    lora_B.zero_()
    row = rank = 0
    for part in parts:
        rows = slice(row, row + part.weight.shape[0])
        row = rows.stop
        if part.lora_A is not None and part.lora_B is not None:
            ranks = slice(rank, rank + part.lora_A.shape[0])
            rank = ranks.stop
            lora_A[ranks] = part.lora_A.detach()
            lora_B[rows, ranks] = part.lora_B.detach() * part.scaling
    lora_A[rank:] = 0
    for index, (factor, scale) in enumerate(zip((lora_B, lora_A.t()), scales, strict=True)):
        largest = (factor.to(torch.float32) / scale.unsqueeze(1)).abs().max()
        balances[index] = balance_of(largest)
