"""The two halves of a fused decoder block, around attention, as autograd functions.

    into attention   x ─ norm ─ q, k, v with LoRA ─ RoPE ─► q, k, v          (and x itself)
    out of attention attention, x ─ o with LoRA ─ add ─ norm ─ gate, up ─ gated ─ down ─ add ─► y

Some families norm each head of q and k before RoPE, and some norm what o and down give before it is
added; then what was normed is saved too.

Shape letters: T tokens (batch and sequence flattened), H hidden size, I intermediate size.

What is saved for the backward is chosen, not left to autograd: never a dequantized weight, never
what a cheap kernel makes again (both norms' outputs, from one number a row; the gated product).
Without `keep.everything` the products of o, gate and up are given up too, and the backward computes
them again. Down's product is needed by nobody and is never computed again.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.engine.projections import Siblings, pairs
from halfbyte.kernels.border import new_with_border, with_border
from halfbyte.kernels.gated import gated_backward_, gated_product
from halfbyte.kernels.head_norm import head_norm, head_norm_backward_
from halfbyte.kernels.rms_norm import Factors, Norm, add_rms_norm
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
        has_head_norms: Whether each head of q and k is normed.
        has_branch_norms: Whether what o and down give is normed.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    has_head_norms: bool = False
    has_branch_norms: bool = False


@dataclass
class Keep:
    """What the second half saves.

    Args:
        everything: Save the products of o, gate and up; else compute them again.
        is_again: The forward runs only for what it saves (under torch's checkpointing), so its
            last product is left out.
        tile: Tokens at a time where they are too many to run at once (see `tiled`); 0: all.
        wide: Down's wide matrix from a forward that runs again, for the backward right behind it.
    """

    everything: bool = True
    is_again: bool = False
    tile: int = 0
    wide: Tensor | None = None


@dataclass(frozen=True)
class IntoWeights:
    """The weights of the first half of a block.

    Args:
        qkv: The projections; one of all three where the model has it so.
        norm: Of x.
        head_norm: Of the heads of q and k, weight `[query heads + key heads, D]`, or None.
        room: Columns behind each row of the gradient of x, for the border that the layer below
            adds to it: down's ranks.
    """

    qkv: Siblings
    norm: Norm
    head_norm: Norm | None = None
    room: int = 0


@dataclass(frozen=True)
class OutWeights:
    """The weights of the second half of a block.

    Args:
        o, gate_up, down: The projections.
        norm: Of the residual before gate and up.
        after_o, after_down: Of what o and down give, before it is added; None adds it as it is.
    """

    o: Siblings
    gate_up: Siblings
    down: Siblings
    norm: Norm
    after_o: Norm | None = None
    after_down: Norm | None = None

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
        weights: IntoWeights,
        shape: BlockShape,
        cos: Tensor,
        sin: Tensor,
        seed: Tensor | None,
        *adapters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x `[T, H]` again, q `[T, heads, D]`, k and v `[T, key-value heads, D]`."""
        qkv = weights.qkv
        scale = _row_factors(x)
        normed = weights.norm(x, columns=qkv.rank, scale=scale)
        wide = qkv.wide(x)
        xa = qkv.down_(normed, wide, seed)
        out = qkv.forward(normed, wide, x.new_empty(x.shape[0], qkv.outputs))
        before, query, key, value = split_heads(out, weights.head_norm, shape, cos, sin)
        ctx.weights = weights
        ctx.save_for_backward(x, scale, xa, before, cos, sin, seed)
        return x.view_as(x), query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the adapters."""
        grad_x, *grad_heads = grads
        x, scale, xa, before, cos, sin, seed = ctx.saved_tensors
        weights, qkv = ctx.weights, ctx.weights.qkv
        grad_wide = new_with_border(x, x.shape[0], qkv.outputs, qkv.rank)
        join_heads(grad_heads, before, weights.head_norm, cos, sin, grad_wide)
        wide = qkv.wide_again(x)
        qkv.up_(grad_wide, wide)
        # Below the first layer is only the frozen embedding.
        is_first = not ctx.needs_input_grad[0]
        grad_normed = None if is_first else qkv.backward_input(grad_wide, wide, seed)
        factors = Factors(scale, weights.norm.weight)
        grads_A = qkv.grad_A_(grad_wide, wide, x, seed, grad_normed, factors)
        adapters = pairs(grads_A, qkv.grad_B(grad_wide, xa))
        del wide, grad_wide
        if grad_normed is None:
            return *[None] * 6, *adapters
        grad_x = weights.norm.backward(grad_normed, x, grad_x, columns=weights.room)
        return grad_x[:, : x.shape[1]], *[None] * 5, *adapters


class OutOfAttention(torch.autograd.Function):
    """`(attention, x)` to `y`: o, residual, norm, gated MLP with LoRA everywhere, residual."""

    @staticmethod
    def forward(
        ctx: Any,
        attention: Tensor,
        x: Tensor,
        weights: OutWeights,
        shape: BlockShape,
        keep: Keep,
        seed: Tensor | None,
        *adapters: Tensor,
    ) -> Tensor:
        """Return y `[T, H]` from attention `[T, heads * D]` and x `[T, H]`."""
        mid, scale, o_xa, o_out, normed = _middle(attention, x, weights, seed)
        gate_up, gate_up_xa = _gate_up(normed, weights.gate_up, seed)
        del normed
        down = weights.down
        wide = down.wide(x)
        hidden, down_xa = gated_product(
            gate_up, shape.intermediate_size, shape.activation, down.lora_A(wide),
            scaling=1.0 if down.scaling is None else down.scaling, mask=down.mask(seed),
        )  # fmt: skip
        y, down_out = x.new_empty(x.shape), None
        if weights.after_down is not None:
            down_out = down.forward(hidden, wide, x.new_empty(x.shape))
            torch.add(mid, weights.after_down(down_out), out=y)
        elif not keep.is_again:
            down.forward(hidden, wide, y, mid)
        if keep.is_again:
            keep.wide = wide
        ctx.weights, ctx.shape, ctx.keep, ctx.everything = weights, shape, keep, keep.everything
        kept = (mid, scale, o_xa, o_out, gate_up, gate_up_xa) if keep.everything else (x,)
        ctx.save_for_backward(attention, down_xa, down_out, seed, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of attention, x and the adapters."""
        grad_y = grads[0]
        weights, shape = ctx.weights, ctx.shape
        attention, down_xa, down_out, seed, *kept = ctx.saved_tensors
        if ctx.everything:
            mid, scale, o_xa, o_out, gate_up, gate_up_xa = kept
        else:
            mid, scale, o_xa, o_out, normed = _middle(attention, kept[0], weights, seed)
            gate_up, gate_up_xa = _gate_up(normed, weights.gate_up, seed)
            del normed
        grad_down = backward_branch(grad_y, down_out, weights.after_down, weights.down.rank)
        wide, ctx.keep.wide = ctx.keep.wide, None
        wide = weights.down.wide_again(grad_y) if wide is None else wide
        grads_B, grads_down = _backward_gated(
            grad_down, down_xa, gate_up, gate_up_xa, wide, weights, shape, seed
        )
        del grad_down, wide
        group, grad_gate_up = weights.gate_up, gate_up
        wide = group.wide_again(grad_y)
        group.up_(grad_gate_up, wide)
        grad_normed = group.backward_input(grad_gate_up, wide, seed)
        factors = Factors(scale, weights.norm.weight)
        grads_A = group.grad_A_(grad_gate_up, wide, mid, seed, grad_normed, factors)
        grads_group = pairs(grads_A, grads_B)
        del grad_gate_up, gate_up, wide
        o, size = weights.o, mid.shape[1]
        grad_mid = weights.norm.backward(grad_normed, mid, grad_y, columns=o.rank)
        del grad_normed
        grad_wide = backward_branch(grad_mid[:, :size], o_out, weights.after_o, o.rank)
        wide = o.wide_again(grad_y)
        o.up_(grad_wide, wide)
        grad_attention = o.backward_input(grad_wide, wide, seed)
        grads_A = o.grad_A_(grad_wide, wide, attention, seed, grad_attention)
        grads_o = pairs(grads_A, o.grad_B(grad_wide[:, :size], o_xa))
        adapters = (*grads_o, *grads_group, *grads_down)
        return grad_attention, grad_mid[:, :size], *[None] * 4, *adapters


def split_heads(
    qkv: Tensor, norm: Norm | None, shape: BlockShape, cos: Tensor, sin: Tensor
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return q, k and v, normed and rotated, and before them what was normed, if anything was.

    Args:
        qkv: `[T, (heads + 2 * key-value heads) * D]`; it is rotated in place where nothing is
            normed.
        norm: Of the heads of q and k.
        shape: Of the block.
        cos: `[T, R]`; sin: `[T, R]`.
    """
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    num_rotated = shape.num_heads + shape.num_key_value_heads
    rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
    before = None
    if norm is not None:
        before, rotated = rotated, head_norm(rotated, norm.weight, norm.eps)
    rope_(rotated, cos, sin, num_rotated)
    return before, rotated[:, : shape.num_heads], rotated[:, shape.num_heads :], value


def join_heads(
    grads: Sequence[Tensor],
    before: Tensor | None,
    norm: Norm | None,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
) -> None:
    """Write the gradient of `split_heads`' argument into the first columns of `out`.

    Args:
        grads: Of q, k and v.
        before: What `split_heads` returned first.
        norm, cos, sin: As given to it.
        out: `[T, >= (heads + 2 * key-value heads) * D]`.
    """
    grad_query, grad_key, grad_value = grads
    rope_backward(grad_query, grad_key, grad_value, cos, sin, out)
    if before is not None and norm is not None:
        rotated = out[:, : before[0].numel()].unflatten(1, before.shape[1:])
        head_norm_backward_(rotated, before, norm.weight, norm.eps)


def _middle(
    attention: Tensor,
    x: Tensor,
    weights: OutWeights,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Return the residual after attention, and what the backward or the MLP needs beside it.

    That is its rows' factors in the norm, o's `x A^T`, what o gave where it is normed, and the
    residual normed (with a border).
    """
    o, norm, o_out = weights.o, weights.norm, None
    wide = o.wide(x)
    delta, o_xa = o.forward_alone(attention, wide, seed, x.new_empty(x.shape))
    if weights.after_o is not None:
        o_out, delta = delta, weights.after_o(delta)
    scale = _row_factors(x)
    mid, normed = add_rms_norm(
        x, delta, norm.weight, norm.eps, columns=weights.gate_up.rank, scale=scale
    )
    return mid, scale, o_xa, o_out, normed


def _row_factors(x: Tensor) -> Tensor:
    """Return room for a norm's factor of each row of x."""
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def backward_branch(grad: Tensor, out: Tensor | None, norm: Norm | None, rank: int) -> Tensor:
    """Return the gradient of what a branch gave, `out`, with a border, from that of its sum."""
    if out is None or norm is None:
        return with_border(grad, rank)
    return norm.backward(grad, out, columns=rank)


def _gate_up(normed: Tensor, group: Siblings, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return gate and up side by side, with room for the backward's border, and their `x A^T`."""
    wide = group.wide(normed)
    xa = group.down_(normed, wide, seed)
    gate_up = new_with_border(normed, normed.shape[0], group.outputs, group.rank)
    group.forward(normed, wide, gate_up[:, : group.outputs])
    return gate_up, xa


def _backward_gated(
    grad_wide: Tensor,
    down_xa: Tensor,
    gate_up: Tensor,
    gate_up_xa: Tensor,
    wide: Tensor,
    weights: OutWeights,
    shape: BlockShape,
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Turn `gate_up` into its gradient; return that of B of gate and up, and down's adapter's."""
    down, group = weights.down, weights.gate_up
    down.up_(grad_wide, wide)
    grad_hidden = down.backward_input(grad_wide, wide, seed)
    grad_B = down.grad_B(grad_wide[:, : down.outputs], down_xa)
    gate_B, up_B, down_A = gated_backward_(
        gate_up, grad_hidden, _of_both(group, gate_up_xa), grad_wide[:, down.outputs :],
        shape.intermediate_size, shape.activation, down.mask(seed), down.lora_A(wide),
    )  # fmt: skip
    is_one = len(group.projections) == 1  # whose outputs are gate, then up
    found = [torch.cat((gate_B, up_B))] if is_one else [gate_B, up_B]
    grads_B = [grad for grad, p in zip(found, group.projections, strict=True) if p.rank]
    return grads_B, pairs(down.split_ranks(down_A), grad_B)


def _of_both(group: Siblings, xa: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of `x A^T` that gate reads, and those that up reads."""
    ranks = [p.rank for p in group.projections]
    gate = xa[:, : ranks[0]]
    return gate, gate if len(ranks) == 1 else xa[:, ranks[0] : sum(ranks)]
