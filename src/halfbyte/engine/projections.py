"""Sibling projections as one matrix product, with their LoRA inside it.

Shape letters: T tokens, K inputs, N outputs of all siblings together, R their LoRA ranks together.

q, k and v (or gate and up) read the same input. Their 4-bit weights are dequantized into one
*wide* matrix whose border holds the adapters:

            K columns        R columns
        ┌────────────────┬─────────────┐
        │ W_q            │ B_q         │
      N │ W_k            │     B_k     │        x_wide = [ x | x A^T ]       (A scaled by alpha/r)
        │ W_v            │         B_v │
        ├────────────────┼─────────────┤
      R │ A_q A_k A_v    │ (not used)  │
        └────────────────┴─────────────┘

    forward    y      = x_wide @ wide[:N]^T            base + LoRA
    backward   grad_x = [ dy | dy B ] @ wide[:, :K]    summed over siblings, base + LoRA

are one product each, so the large tensors are read and written once. The float32 accumulator of
the product adds the LoRA term before rounding: one rounding less than base, LoRA, then addition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.wide import fill_border_, fill_weight_
from halfbyte.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Projection:
    """One linear layer as the engine sees it.

    Args:
        weight: 4-bit weight of shape `[N_i, K]`, or a dense `[N_i, K]` one.
        bias: `[N_i]` or None.
        lora_A: `[r, K]` float32 parameter, or None where the layer has no adapter.
        lora_B: `[N_i, r]` float32 parameter, or None.
        scaling: `alpha / r` (or peft's rsLoRA variant of it).
    """

    weight: QuantizedWeight | Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0

    @property
    def outputs(self) -> int:
        """Number of output features."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """Number of input features."""
        return int(self.weight.shape[1])

    @property
    def rank(self) -> int:
        """LoRA rank; 0 without an adapter."""
        return 0 if self.lora_A is None else int(self.lora_A.shape[0])


@dataclass(frozen=True)
class Siblings:
    """Projections of one input, treated as one product."""

    projections: tuple[Projection, ...]

    @property
    def inputs(self) -> int:
        """Inputs."""
        return self.projections[0].inputs

    @property
    def outputs(self) -> int:
        """Outputs of all siblings."""
        return sum(p.outputs for p in self.projections)

    @property
    def rank(self) -> int:
        """LoRA ranks of all siblings, padded so that rows stay aligned to 16 bytes."""
        return -(-sum(p.rank for p in self.projections) // 8) * 8

    @property
    def adapters(self) -> list[Tensor]:
        """The trainable matrices, A then B of each adapted sibling."""
        return [t for p in self.projections for t in (p.lora_A, p.lora_B) if t is not None]

    def wide(self, dtype: torch.dtype) -> Tensor:
        """Return the wide matrix `[N + R, K + R]`, made anew."""
        first = self.projections[0].weight
        device = first.packed.device if isinstance(first, QuantizedWeight) else first.device
        wide = torch.empty(
            self.outputs + self.rank, self.inputs + self.rank, dtype=dtype, device=device
        )
        row, column = 0, self.inputs
        for p in self.projections:
            block = wide[row : row + p.outputs, : self.inputs]
            if isinstance(p.weight, QuantizedWeight):
                fill_weight_(block, p.weight)
            else:
                block.copy_(p.weight)
            row += p.outputs
        if self.rank:
            row = 0
            for p in self.projections:
                fill_border_(
                    wide, p.lora_A, p.lora_B, p.scaling,
                    rows=(row, p.outputs), column=column, inputs=self.inputs, outputs=self.outputs,
                )  # fmt: skip
                row += p.outputs
                column += p.rank
            if column < self.inputs + self.rank:
                wide[: self.outputs, column:] = 0
                wide[self.outputs + column - self.inputs :, : self.inputs] = 0
        return wide

    def down_(self, x_wide: Tensor, wide: Tensor) -> Tensor:
        """Write `x A^T`, scaled, into the last R columns of `x_wide` and return those columns."""
        xa = x_wide[:, self.inputs :]
        if self.rank:
            torch.mm(x_wide[:, : self.inputs], wide[self.outputs :, : self.inputs].t(), out=xa)
        return xa

    def forward(self, x_wide: Tensor, wide: Tensor, out: Tensor) -> Tensor:
        """Write all siblings' outputs into `out` `[T, N]` and return it."""
        torch.mm(x_wide, wide[: self.outputs].t(), out=out)
        row = 0
        for p in self.projections:
            if p.bias is not None:
                out[:, row : row + p.outputs] += p.bias
            row += p.outputs
        return out

    def backward_input(self, grad_wide: Tensor, wide: Tensor) -> Tensor:
        """Return the gradient of x `[T, K]`.

        Args:
            grad_wide: `[T, N + R]`: the outputs' gradient; its last R columns are filled here with
                `dy B`, which `backward_adapters` reads.
            wide: What `wide()` returned.
        """
        if self.rank:
            torch.mm(
                grad_wide[:, : self.outputs],
                wide[: self.outputs, self.inputs :],
                out=grad_wide[:, self.outputs :],
            )
        return torch.mm(grad_wide, wide[:, : self.inputs])

    def backward_adapters(self, grad_wide: Tensor, x: Tensor, xa: Tensor) -> list[Tensor]:
        """Return the float32 gradients of `adapters`, in their order.

        Args:
            grad_wide: As `backward_input` left it.
            x: `[T, K]`, the input.
            xa: `[T, R]`, the scaled `x A^T` of the forward.
        """
        if not self.rank:
            return []
        grad_A = _product_float32(grad_wide[:, self.outputs :].t(), x)
        grads: list[Tensor] = []
        row = rank = 0
        for p in self.projections:
            if p.rank:
                grads.append(grad_A[rank : rank + p.rank] * p.scaling)
                columns = grad_wide[:, row : row + p.outputs]
                grads.append(_product_float32(columns.t(), xa[:, rank : rank + p.rank]))
            row += p.outputs
            rank += p.rank
        return grads


def _product_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` as float32 (or float64), without rounding the sum to the inputs' dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.mm(a.to(wide), b.to(wide))
