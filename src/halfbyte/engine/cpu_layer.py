"""A decoder layer run fused on a CPU: siblings in one product, the rest in compiled loops.

It is the layer of `layer.py` with other products. A wide matrix does not pay on a CPU: there BLAS
copies operands whose rows have a pitch. So base and update are products of their own, over
contiguous operands, and the update is added into the result by the product that makes it.

Shape letters: T tokens, K inputs and N outputs of some siblings, R their LoRA ranks together.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.engine.attention import Layout, attention
from halfbyte.engine.block import (
    BlockShape,
    IntoWeights,
    Keep,
    OutWeights,
    backward_branch,
    join_heads,
    split_heads,
)
from halfbyte.engine.layer import FusedLayer
from halfbyte.engine.projections import Projection, Siblings, pairs
from halfbyte.kernels.dropout import add_masked_product_, dropout
from halfbyte.kernels.gated import gated_backward_, gated_forward
from halfbyte.kernels.rms_norm import add_rms_norm
from halfbyte.kernels.wide import assemble_


@dataclass(frozen=True)
class Group:
    """Siblings, and the products with them. Weights are made for one product and dropped."""

    siblings: Siblings

    @functools.cached_property
    def adapted(self) -> list[tuple[Projection, slice, slice]]:
        """The siblings with an adapter, each with its outputs and its ranks."""
        found, start, rank = [], 0, 0
        for p, end in zip(self.siblings.projections, self.siblings.columns, strict=True):
            if p.rank:
                found.append((p, slice(start, end), slice(rank, rank + p.rank)))
            start, rank = end, rank + p.rank
        return found

    @property
    def rank(self) -> int:
        """R."""
        return self.adapted[-1][2].stop if self.adapted else 0

    def weight(self, like: Tensor) -> Tensor:
        """Return the dense weights, one below the other: `[N, K]`."""
        bare = [Projection(p.weight) for p in self.siblings.projections]
        return assemble_(like.new_empty(self.siblings.outputs, self.siblings.inputs), bare)

    def lora_A(self, like: Tensor) -> Tensor:  # noqa: N802
        """Return all A, one below the other: `[R, K]`."""
        parts = [p.lora_A.detach() for p, _, _ in self.adapted if p.lora_A is not None]
        return torch.cat(parts).to(like.dtype)

    def lora_B(self, like: Tensor) -> Tensor:  # noqa: N802
        """Return all B, scaled, as blocks along the diagonal: `[N, R]`."""
        blocks = like.new_zeros(self.siblings.outputs, self.rank)
        for p, outputs, ranks in self.adapted:
            if p.lora_B is not None:
                blocks[outputs, ranks] = p.lora_B.detach() * p.scaling
        return blocks

    def forward(self, x: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `y` `[T, N]` of x `[T, K]`, and `x A^T` `[T, R]`."""
        y = x @ self.weight(x).t()
        start = 0
        for p, end in zip(self.siblings.projections, self.siblings.columns, strict=True):
            if p.bias is not None:
                y[:, start:end] += p.bias
            start = end
        if not self.adapted:
            return y, None
        xa = self.read(x, seed) @ self.lora_A(x).t()
        return y.addmm_(xa, self.lora_B(x).t()), xa

    def read(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """Return what the adapters read of x `[T, K]`."""
        mask = self.siblings.mask(seed)
        return x if mask is None else dropout(x, mask)

    def backward_input(self, grad: Tensor, gb: Tensor | None, seed: Tensor | None) -> Tensor:
        """Return the gradient of x from that of y, `[T, N]`, and `gb`."""
        grad_x = grad @ self.weight(grad)
        if gb is None:
            return grad_x
        mask, lora_A = self.siblings.mask(seed), self.lora_A(grad)
        if mask is None:
            return grad_x.addmm_(gb, lora_A)
        return add_masked_product_(grad_x, gb, lora_A, mask)

    def up(self, grad: Tensor) -> Tensor | None:
        """Return `gb`, the scaled `dy B` `[T, R]`."""
        return grad @ self.lora_B(grad) if self.adapted else None

    def grad_A(self, gb: Tensor | None, x: Tensor, seed: Tensor | None) -> list[Tensor]:  # noqa: N802
        """Return the float32 gradient of each A."""
        if gb is None:
            return []
        grad = _wide(gb.t() @ self.read(x, seed))
        return [grad[ranks] for _, _, ranks in self.adapted]

    def grad_B(self, grad: Tensor, xa: Tensor | None) -> list[Tensor]:  # noqa: N802
        """Return the float32 gradient of each B."""
        if xa is None:
            return []
        # Transposed, and with the other blocks too: one product with long rows is the quickest.
        blocks = _wide(xa.t() @ grad)
        return [blocks[ranks, outputs].t() * p.scaling for p, outputs, ranks in self.adapted]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CpuLayer(FusedLayer):
    """A decoder layer of the Llama shape on a CPU, in bfloat16 or float32.

    Args:
        layer: The transformers layer.
        config: The model's configuration.
        index: Of the layer; its dropout masks are its own.
    """

    def __init__(self, layer: Any, config: Any, index: int) -> None:
        super().__init__(layer, config, index)
        self.products = Groups(*map(Group, self.all_siblings))

    def _forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        keep: Keep,
        seed: Tensor | None,
    ) -> Tensor:
        groups, into, out = self.products, self.into, self.out
        x, query, key, value = _IntoAttention.apply(
            x, groups.qkv, into, self.shape, cos, sin, seed, *into.qkv.adapters
        )
        mixed = attention(query, key, value, layout, self.scale, self.window)
        return _OutOfAttention.apply(mixed, x, groups, out, self.shape, keep, seed, *out.adapters)


@dataclass(frozen=True)
class Groups:
    """The products of a layer."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group


class _IntoAttention(torch.autograd.Function):
    """`x` to `(x, q, k, v)`: norm, three projections with LoRA, rotary embedding."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Group,
        weights: IntoWeights,
        shape: BlockShape,
        cos: Tensor,
        sin: Tensor,
        seed: Tensor | None,
        *adapters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, xa = group.forward(weights.norm(x), seed)
        before, query, key, value = split_heads(out, weights.head_norm, shape, cos, sin)
        ctx.group, ctx.weights = group, weights
        ctx.save_for_backward(x, xa, before, cos, sin, seed)
        return x.view_as(x), query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *grad_heads = grads
        x, xa, before, cos, sin, seed = ctx.saved_tensors
        group, weights = ctx.group, ctx.weights
        grad = x.new_empty(x.shape[0], group.siblings.outputs)
        join_heads(grad_heads, before, weights.head_norm, cos, sin, grad)
        gb = group.up(grad)
        normed = weights.norm(x)
        adapters = pairs(group.grad_A(gb, normed, seed), group.grad_B(grad, xa))
        del normed
        if not ctx.needs_input_grad[0]:  # below the first layer is only the frozen embedding
            return *[None] * 7, *adapters
        grad_normed = group.backward_input(grad, gb, seed)
        grad_x = weights.norm.backward(grad_normed, x, grad_x)
        return grad_x, *[None] * 6, *adapters


class _OutOfAttention(torch.autograd.Function):
    """`(attention, x)` to `y`: o, residual, norm, gated MLP with LoRA everywhere, residual."""

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        x: Tensor,
        groups: Groups,
        weights: OutWeights,
        shape: BlockShape,
        keep: Keep,
        seed: Tensor | None,
        *adapters: Tensor,
    ) -> Tensor:
        norm, o_out, down_out = weights.norm, None, None
        delta, o_xa = groups.o.forward(mixed, seed)
        if weights.after_o is not None:
            o_out, delta = delta, weights.after_o(delta)
        mid, normed = add_rms_norm(x, delta, norm.weight, norm.eps)
        gate_up, gate_up_xa = groups.gate_up.forward(normed, seed)
        del delta, normed
        hidden = gated_forward(gate_up, shape.intermediate_size, shape.activation)
        down_xa = None
        if keep.is_again and weights.after_down is None:  # nobody needs down's product twice
            if groups.down.adapted:
                read = groups.down.read(hidden, seed)
                down_xa = read @ groups.down.lora_A(hidden).t()
            y = torch.empty_like(mid)
        else:
            y, down_xa = groups.down.forward(hidden, seed)
            if weights.after_down is not None:
                down_out, y = y, weights.after_down(y)
            y += mid
        ctx.groups, ctx.weights, ctx.shape = groups, weights, shape
        saved = (mid, o_xa, o_out, gate_up, gate_up_xa, down_xa, down_out)
        ctx.save_for_backward(mixed, seed, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y = grads[0]
        mixed, seed, mid, o_xa, o_out, gate_up, gate_up_xa, down_xa, down_out = ctx.saved_tensors
        groups, weights, shape = ctx.groups, ctx.weights, ctx.shape
        size, down, group, o = shape.intermediate_size, groups.down, groups.gate_up, groups.o

        grad_down = backward_branch(grad_y, down_out, weights.after_down, 0)
        gb = down.up(grad_down)
        grad_hidden = down.backward_input(grad_down, gb, seed)
        nothing = grad_y.new_empty(grad_y.shape[0], 0)
        _, _, down_A = gated_backward_(
            gate_up, grad_hidden, (nothing, nothing), nothing if gb is None else gb,
            size, shape.activation, down.siblings.mask(seed),
        )  # fmt: skip
        grads_down = pairs([down_A] if down.adapted else [], down.grad_B(grad_down, down_xa))
        del grad_hidden, grad_down

        gb, grad_gate_up = group.up(gate_up), gate_up
        grad_normed = group.backward_input(grad_gate_up, gb, seed)
        normed = weights.norm(mid)
        grads_group = pairs(group.grad_A(gb, normed, seed), group.grad_B(grad_gate_up, gate_up_xa))
        grad_mid = weights.norm.backward(grad_normed, mid, grad_y)
        del normed, grad_normed, gate_up, grad_gate_up

        grad_o = backward_branch(grad_mid, o_out, weights.after_o, 0)
        gb = o.up(grad_o)
        grad_mixed = o.backward_input(grad_o, gb, seed)
        grads_o = pairs(o.grad_A(gb, mixed, seed), o.grad_B(grad_o, o_xa))
        return grad_mixed, grad_mid, *[None] * 5, *grads_o, *grads_group, *grads_down
