"""Sibling projections as one matrix product, with their LoRA inside it.

Shape letters: T tokens, K inputs, N outputs of all siblings together, R their LoRA ranks together.

q, k and v (or gate and up) read the same input. Their 4-bit weights are dequantized into one *wide*
matrix `[N + R, K + R]` whose border holds the adapters (drawn in `kernels/wide.py`). Then

    forward    y      = [ x | x A^T ] @ wide[:N]^T     base + LoRA
    backward   grad_x = [ dy | dy B ] @ wide[:, :K]    summed over siblings, base + LoRA

are one product each, so the large tensors are read and written once. The float32 accumulator of
the product adds the LoRA term before rounding: one rounding less than base, LoRA, then addition.
The wide matrix lives for one forward or one backward, and is made again for the next. Where memory
is free it stays (`Stay`): then only its border is written anew, since adapters change and weights
do not.
"""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.kernels.border import new_with_border, pitch, with_border
from halfbyte.kernels.dropout import Mask
from halfbyte.kernels.rms_norm import Factors
from halfbyte.kernels.skinny import product_float32, rank_gradient, rank_product_
from halfbyte.kernels.wide import assemble_
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
    def rank(self) -> int:
        """LoRA rank; 0 without an adapter."""
        return 0 if self.lora_A is None else int(self.lora_A.shape[0])


@dataclass
class Stay:
    """Whether a wide matrix stays between products, and where.

    Args:
        granted: Memory is there for it.
        matrix: `[N + R, K + R]`, once it was made.
        transposed: What the backward reads, where that is another matrix.
        factors: LoRA's, where both of these have been made; they stand in their borders, too.
    """

    granted: bool = False
    matrix: Tensor | None = None
    transposed: Tensor | None = None
    factors: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of what stays."""
        tensors = (self.matrix, self.transposed, self.factors)
        # With what lies between rows.
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)

    def end(self) -> None:
        """Give the memory back."""
        self.granted, self.matrix, self.transposed, self.factors = False, None, None, None


@dataclass(frozen=True)
class Siblings:
    """Projections of one input, treated as one product.

    Args:
        projections: In the order of their outputs.
        dropout: Probability of dropping an element of what the adapters read; the siblings share a
            mask. It counts only where a seed is given.
        salt: Tells the masks of a model apart.
        stay: Of the wide matrix.
    """

    projections: tuple[Projection, ...]
    dropout: float = 0.0
    salt: int = 0
    stay: Stay = field(default_factory=Stay, compare=False)

    @functools.cached_property
    def inputs(self) -> int:
        """K."""
        return int(self.projections[0].weight.shape[1])

    @functools.cached_property
    def outputs(self) -> int:
        """N."""
        return self.columns[-1]

    @functools.cached_property
    def columns(self) -> tuple[int, ...]:
        """Where the outputs of each sibling end."""
        ends, end = [], 0
        for p in self.projections:
            end += int(p.weight.shape[0])
            ends.append(end)
        return tuple(ends)

    @functools.cached_property
    def rank(self) -> int:
        """R, padded to a multiple of 8."""
        return -(-sum(p.rank for p in self.projections) // 8) * 8

    @functools.cached_property
    def scaling(self) -> float | None:
        """The siblings' scaling where they share one, else None."""
        scalings = {p.scaling for p in self.projections if p.rank}
        return scalings.pop() if len(scalings) == 1 else None

    @functools.cached_property
    def has_bias(self) -> bool:
        """Whether any sibling has a bias."""
        return any(p.bias is not None for p in self.projections)

    @functools.cached_property
    def adapters(self) -> tuple[Tensor, ...]:
        """The trainable matrices, A then B of each adapted sibling."""
        pairs = ((p.lora_A, p.lora_B) for p in self.projections)
        return tuple(t for pair in pairs for t in pair if t is not None)

    @property
    def row_bytes(self) -> int:
        """What a product makes of each row that it reads, beside what it returns."""
        return 0

    def passing_bytes(self, itemsize: int) -> int:
        """Return what the wide matrix takes while a product runs."""
        return (self.outputs + self.rank) * pitch(self.inputs, self.rank, itemsize) * itemsize

    def staying_bytes(self, itemsize: int) -> int:
        """Return what it takes where it stays."""
        return self.passing_bytes(itemsize)

    def wide(self, like: Tensor) -> Tensor:
        """Return the wide matrix `[N + R, K + R]` in the dtype and on the device of `like`."""
        if self.stay.matrix is not None:
            return assemble_(self.stay.matrix, self.projections, only_border=True)
        wide = new_with_border(like, self.outputs + self.rank, self.inputs, self.rank)
        assemble_(wide, self.projections)
        if self.stay.granted:
            self.stay.matrix = wide
        return wide

    def wide_again(self, like: Tensor) -> Tensor:
        """Return what `wide` returned in the forward; adapters have not changed since."""
        return self.wide(like) if self.stay.matrix is None else self.stay.matrix

    def down_(self, x_wide: Tensor, wide: Tensor, seed: Tensor | None) -> Tensor:
        """Write `x A^T` into the last R columns of `x_wide`; return a copy times the scaling.

        The copy `[T, R]` is what `grad_B` is made from.
        """
        return self._down(x_wide[:, : self.inputs], x_wide[:, self.inputs :], wide, seed)

    def _down(self, x: Tensor, border: Tensor, wide: Tensor, seed: Tensor | None) -> Tensor:
        if not self.rank:
            return border
        scaling = 1.0 if self.scaling is None else self.scaling
        xa = rank_product_(border, x, self.lora_A(wide).t(), mask=self.mask(seed), scaling=scaling)
        return xa if self.scaling is not None else xa * self._scalings(xa)

    def mask(self, seed: Tensor | None) -> Mask | None:
        """Return what this seed drops, or None where nothing is dropped."""
        if seed is None or not self.dropout or not self.rank:
            return None
        return Mask(self.dropout, seed, self.salt)

    def _scalings(self, like: Tensor) -> Tensor:
        """Return each sibling's scaling, as often as it has ranks: `[R]`."""
        parts = [like.new_full((p.rank,), p.scaling) for p in self.projections]
        padding = like.new_zeros(self.rank - sum(p.rank for p in self.projections))
        return torch.cat([*parts, padding])

    def forward(
        self, x_wide: Tensor, wide: Tensor, out: Tensor, beside: Tensor | None = None
    ) -> Tensor:
        """Write all siblings' outputs into `out` `[T, N]`, added to `beside`, and return it."""
        weight = wide[: self.outputs].t()
        if beside is None:
            torch.mm(x_wide, weight, out=out)
        else:
            torch.addmm(beside, x_wide, weight, out=out)
        return self.add_bias_(out)

    def forward_alone(
        self, x: Tensor, wide: Tensor, seed: Tensor | None, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `forward` and `down_` return, of an `x` `[T, K]` that has no border."""
        x_wide = with_border(x, self.rank)
        xa = self.down_(x_wide, wide, seed)
        return self.forward(x_wide, wide, out), xa

    def add_bias_(self, out: Tensor) -> Tensor:
        """Add the siblings' biases to their outputs, and return these."""
        if self.has_bias:
            start = 0
            for p, end in zip(self.projections, self.columns, strict=True):
                if p.bias is not None:
                    out[:, start:end] += p.bias
                start = end
        return out

    def up_(self, grad_wide: Tensor, wide: Tensor) -> None:
        """Write `dy B`, scaled, into the last R columns of `grad_wide` `[T, N + R]`."""
        if self.rank:
            grad, border = grad_wide[:, : self.outputs], grad_wide[:, self.outputs :]
            rank_product_(border, grad, self.lora_B(wide))

    def backward_input(self, grad_wide: Tensor, wide: Tensor, seed: Tensor | None) -> Tensor:
        """Return the gradient of x `[T, K]` from `grad_wide`, which `up_` has completed.

        Where elements are dropped, the adapters' share is missing: whoever makes the gradient of A
        adds it (`grad_A_` here, `gated_backward_` for down), with the mask at hand.
        """
        if self.mask(seed) is None:
            return torch.mm(grad_wide, wide[:, : self.inputs])
        return torch.mm(grad_wide[:, : self.outputs], wide[: self.outputs, : self.inputs])

    def lora_A(self, wide: Tensor) -> Tensor:  # noqa: N802
        """Return all A, one below the other, as they stand in the wide matrix: `[R, K]`."""
        return wide[self.outputs :, : self.inputs]

    def lora_B(self, wide: Tensor) -> Tensor:  # noqa: N802
        """Return all B, scaled, each in its own rows and columns: `[N, R]`."""
        return wide[: self.outputs, self.inputs :]

    def grad_A_(  # noqa: N802
        self,
        grad_wide: Tensor,
        wide: Tensor,
        x: Tensor,
        seed: Tensor | None,
        grad_x: Tensor | None,
        norm: Factors | None = None,
    ) -> list[Tensor]:
        """Return the float32 gradient of each sibling's A; complete `grad_x` of `backward_input`.

        Args:
            grad_wide: With the border of `up_`.
            wide: The wide matrix.
            x: `[T, K]`, what the projections read, or with `norm` what was normed for them.
            seed: Of the forward.
            grad_x: Gradient of what they read, or None where nobody needs it.
            norm: What made the norm of x.
        """
        if not self.rank:
            return []
        border = grad_wide[:, self.outputs :]
        grad = rank_gradient(border, x, self.mask(seed), self.lora_A(wide), grad_x, norm)
        return self.split_ranks(grad)

    def grad_B(self, grad_wide: Tensor, xa: Tensor) -> list[Tensor]:  # noqa: N802
        """Return the float32 gradient of each sibling's B, from `dy` and the scaled `x A^T`."""
        grads, start, rank = [], 0, 0
        for p, end in zip(self.projections, self.columns, strict=True):
            if p.rank:
                own = xa[:, rank : rank + p.rank]
                grads.append(product_float32(grad_wide[:, start:end].t(), own))
            start, rank = end, rank + p.rank
        return grads

    def split_ranks(self, grad: Tensor) -> list[Tensor]:
        """Split the rows of `[R, ...]` into those of each adapted sibling, without the padding."""
        ranks = [p.rank for p in self.projections if p.rank]
        return list(grad[: sum(ranks)].split(ranks)) if ranks else []


def pairs(grads_A: list[Tensor], grads_B: list[Tensor]) -> list[Tensor]:
    """Return the gradients in the order of `Siblings.adapters`."""
    return [grad for pair in zip(grads_A, grads_B, strict=True) for grad in pair]
