"""The two halves of a fused decoder block, around attention, as autograd functions.

    into attention   x ─ norm ─ q, k, v with LoRA ─ RoPE ─► q, k, v          (and x itself)
    out of attention attention, x ─ o with LoRA ─ add ─ norm ─ gate, up ─ gated ─ down ─ add ─► y

Shape letters: T tokens (batch and sequence flattened), H hidden size, I intermediate size.

What is saved for the backward is chosen, not left to autograd: never a dequantized weight, never
what a cheap kernel makes again (both norms' outputs, the gated product). Without `keep.everything`
the products of o, gate and up are given up too, and the backward computes them again. Down's
product is needed by nobody and is never computed again.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.engine.projections import Siblings, pairs
from halfbyte.kernels.border import with_border
from halfbyte.kernels.gated import gated_backward_, gated_forward
from halfbyte.kernels.rms_norm import add_rms_norm, rms_norm_backward
from halfbyte.kernels.rope import rope_, rope_backward


@dataclass(frozen=True)
class BlockShape:
    """What a block needs to know beside its weights.

    Args:
        num_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Elements of a head.
        intermediate_size: I.
        activation: "silu" or "gelu_tanh".
        input_eps: Epsilon of the norm before attention.
        post_eps: Epsilon of the norm before the MLP.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    input_eps: float
    post_eps: float


@dataclass
class Keep:
    """What the second half saves.

    Args:
        everything: Save the products of o, gate and up; else compute them again.
        is_again: The forward runs only for what it saves (under torch's checkpointing), so its
            last product is left out.
    """

    everything: bool = True
    is_again: bool = False


@dataclass(frozen=True)
class OutWeights:
    """The weights of the second half of a block."""

    o: Siblings
    gate_up: Siblings
    down: Siblings

    @functools.cached_property
    def adapters(self) -> tuple[Tensor, ...]:
        """The trainable matrices of all of them, in order."""
        return self.o.adapters + self.gate_up.adapters + self.down.adapters


class IntoAttention(torch.autograd.Function):
    """`x` to `(x, q, k, v)`: norm, three projections with LoRA, rotary embedding."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        qkv: Siblings,
        shape: BlockShape,
        norm_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        seed: Tensor | None,
        *adapters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x `[T, H]` again, q `[T, heads, D]`, k and v `[T, key-value heads, D]`."""
        _, normed = add_rms_norm(x, None, norm_weight, shape.input_eps, columns=qkv.rank)
        wide = qkv.wide(x)
        xa = qkv.down_(normed, wide, seed)
        out = qkv.forward(normed, wide, x.new_empty(x.shape[0], qkv.outputs))
        heads = out.view(x.shape[0], -1, shape.head_dim)
        num_rotated = shape.num_heads + shape.num_key_value_heads
        rope_(heads, cos, sin, num_rotated)
        ctx.qkv, ctx.shape = qkv, shape
        ctx.save_for_backward(x, xa, norm_weight, cos, sin, seed)
        query = heads[:, : shape.num_heads]
        key = heads[:, shape.num_heads : num_rotated]
        return x.view_as(x), query, key, heads[:, num_rotated:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the adapters."""
        grad_x, grad_query, grad_key, grad_value = grads
        x, xa, norm_weight, cos, sin, seed = ctx.saved_tensors
        qkv, shape = ctx.qkv, ctx.shape
        grad_wide = x.new_empty(x.shape[0], qkv.outputs + qkv.rank)
        rope_backward(grad_query, grad_key, grad_value, cos, sin, grad_wide)
        wide = qkv.wide_again(x)
        qkv.up_(grad_wide, wide)
        _, normed = add_rms_norm(x, None, norm_weight, shape.input_eps)
        adapters = pairs(qkv.grad_A(grad_wide, normed, seed), qkv.grad_B(grad_wide, xa))
        del normed
        if not ctx.needs_input_grad[0]:  # below the first layer is only the frozen embedding
            return *[None] * 7, *adapters
        grad_normed = qkv.backward_input(grad_wide, wide, seed)
        del wide, grad_wide
        grad_x = rms_norm_backward(
            grad_normed, x, norm_weight, shape.input_eps, grad_x, columns=qkv.rank
        )
        return grad_x[:, : x.shape[1]], *[None] * 6, *adapters


class OutOfAttention(torch.autograd.Function):
    """`(attention, x)` to `y`: o, residual, norm, gated MLP with LoRA everywhere, residual."""

    @staticmethod
    def forward(
        ctx: Any,
        attention: Tensor,
        x: Tensor,
        weights: OutWeights,
        shape: BlockShape,
        norm_weight: Tensor,
        keep: Keep,
        seed: Tensor | None,
        *adapters: Tensor,
    ) -> Tensor:
        """Return y `[T, H]` from attention `[T, heads * D]` and x `[T, H]`."""
        mid, o_xa, normed = _middle(attention, x, weights, shape, norm_weight, seed)
        gate_up, gate_up_xa = _gate_up(normed, weights.gate_up, seed)
        del normed
        down = weights.down
        hidden = gated_forward(
            gate_up, shape.intermediate_size, shape.activation, columns=down.rank
        )
        wide = down.wide(x)
        down_xa = down.down_(hidden, wide, seed)
        y = x.new_empty(x.shape)
        if not keep.is_again:
            down.forward(hidden, wide, y)
            y += mid
        ctx.weights, ctx.shape, ctx.everything = weights, shape, keep.everything
        kept = (mid, o_xa, gate_up, gate_up_xa) if keep.everything else (x,)
        ctx.save_for_backward(attention, norm_weight, down_xa, seed, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of attention, x and the adapters."""
        grad_y = grads[0]
        weights, shape = ctx.weights, ctx.shape
        attention, norm_weight, down_xa, seed, *kept = ctx.saved_tensors
        if ctx.everything:
            mid, o_xa, gate_up, gate_up_xa = kept
        else:
            mid, o_xa, normed = _middle(attention, kept[0], weights, shape, norm_weight, seed)
            gate_up, gate_up_xa = _gate_up(normed, weights.gate_up, seed)
            del normed
        grads_B, grads_down = _backward_gated(
            grad_y, down_xa, gate_up, gate_up_xa, weights, shape, seed
        )
        group, grad_gate_up = weights.gate_up, gate_up
        wide = group.wide_again(grad_y)
        group.up_(grad_gate_up, wide)
        grad_normed = group.backward_input(grad_gate_up, wide, seed)
        _, normed = add_rms_norm(mid, None, norm_weight, shape.post_eps)
        grads_group = pairs(group.grad_A(grad_gate_up, normed, seed), grads_B)
        del normed, grad_gate_up, gate_up, wide
        o, size = weights.o, mid.shape[1]
        grad_wide = rms_norm_backward(
            grad_normed, mid, norm_weight, shape.post_eps, grad_y, columns=o.rank
        )
        del grad_normed
        wide = o.wide_again(grad_y)
        o.up_(grad_wide, wide)
        grad_attention = o.backward_input(grad_wide, wide, seed)
        grads_o = pairs(o.grad_A(grad_wide, attention, seed), o.grad_B(grad_wide[:, :size], o_xa))
        adapters = (*grads_o, *grads_group, *grads_down)
        return grad_attention, grad_wide[:, :size], *[None] * 5, *adapters


def _middle(
    attention: Tensor,
    x: Tensor,
    weights: OutWeights,
    shape: BlockShape,
    norm_weight: Tensor,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual after attention, o's `x A^T`, and the residual normed (with a border)."""
    o = weights.o
    wide = o.wide(x)
    attention_wide = with_border(attention, o.rank)
    o_xa = o.down_(attention_wide, wide, seed)
    delta = o.forward(attention_wide, wide, x.new_empty(x.shape))
    mid, normed = add_rms_norm(x, delta, norm_weight, shape.post_eps, columns=weights.gate_up.rank)
    return mid, o_xa, normed


def _gate_up(normed: Tensor, group: Siblings, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return gate and up side by side, with room for the backward's border, and their `x A^T`."""
    wide = group.wide(normed)
    xa = group.down_(normed, wide, seed)
    gate_up = normed.new_empty(normed.shape[0], group.outputs + group.rank)
    group.forward(normed, wide, gate_up[:, : group.outputs])
    return gate_up, xa


def _backward_gated(
    grad_y: Tensor,
    down_xa: Tensor,
    gate_up: Tensor,
    gate_up_xa: Tensor,
    weights: OutWeights,
    shape: BlockShape,
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Turn `gate_up` into its gradient; return that of B of gate and up, and down's adapter's."""
    down, group = weights.down, weights.gate_up
    grad_wide = with_border(grad_y, down.rank)
    wide = down.wide_again(grad_y)
    down.up_(grad_wide, wide)
    grad_hidden = down.backward_input(grad_wide, wide, seed)
    grad_B = down.grad_B(grad_wide[:, : down.outputs], down_xa)
    gate_B, up_B, down_A = gated_backward_(
        gate_up, grad_hidden, gate_up_xa, grad_wide[:, down.outputs :],
        shape.intermediate_size, shape.activation,
        down.mask(seed),
    )  # fmt: skip
    gate, up = group.projections
    both = ((gate_B[:, : gate.rank], gate), (up_B[:, gate.rank : gate.rank + up.rank], up))
    grads_B = [grad for grad, projection in both if projection.rank]
    return grads_B, pairs(down.split_ranks(down_A), grad_B)
