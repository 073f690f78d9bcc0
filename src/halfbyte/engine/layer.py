"""A transformers decoder layer, read once and run fused.

The layer of the model stays what and where it is; this is another way to run it, with the same
parameters. It computes causal self-attention without a key-value cache, for training and scoring.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halfbyte.engine.attention import Layout, attention, backends
from halfbyte.engine.block import (
    BlockShape,
    IntoAttention,
    IntoWeights,
    Keep,
    OutOfAttention,
    OutWeights,
)
from halfbyte.engine.families import ACTIVATIONS, parts_of
from halfbyte.engine.offload import Away, Passage
from halfbyte.engine.projections import Projection, Siblings
from halfbyte.engine.projections_fp8 import fp8_siblings
from halfbyte.engine.tiled import Tiled
from halfbyte.kernels.rms_norm import Norm
from halfbyte.quant.linear import NF4Linear


class FusedLayer:
    """The Llama shape of a decoder layer: pre-norm attention, pre-norm gated MLP.

    It holds the layer's tensors as they are now; after `set_adapter` or `.to(device)` make another.

    Args:
        layer: The transformers layer.
        config: The model's configuration.
        index: Of the layer; its dropout masks are its own.
    """

    siblings: Callable[[tuple[Projection, ...], float, int], Siblings] = Siblings
    """Puts projections of one input together, with their dropout and its salt."""

    def __init__(self, layer: Any, config: Any, index: int) -> None:
        parts = parts_of(layer, config)
        self.layer = layer
        self.scale = float(layer.self_attn.scaling)
        self.window, self.rope = parts.window, parts.rope
        self.shape = BlockShape(
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=int(layer.self_attn.head_dim),
            intermediate_size=config.intermediate_size,
            activation=ACTIVATIONS[parts.activation],
            has_head_norms=parts.head_norms is not None,
            has_branch_norms=parts.branch_norms is not None,
        )
        after_o, after_down = parts.branch_norms or (None, None)
        down = self._siblings(4 * index + 3, parts.down)
        self.into = IntoWeights(
            qkv=self._siblings(4 * index, *parts.qkv.values()),
            norm=parts.input_norm,
            head_norm=_head_norm(self.shape, parts.head_norms),
            # Layers are alike: the one below has as many ranks.
            room=down.rank if after_down is None else 0,
        )
        self.out = OutWeights(
            o=self._siblings(4 * index + 1, parts.o),
            gate_up=self._siblings(4 * index + 2, *parts.gate_up.values()),
            down=down,
            norm=parts.mlp_norm,
            after_o=after_o,
            after_down=after_down,
        )

    @property
    def qkv(self) -> Siblings:
        """The projections before attention."""
        return self.into.qkv

    @property
    def has_dropout(self) -> bool:
        """Whether training drops elements of what the adapters read."""
        return any(siblings.dropout for siblings in self.all_siblings)

    @property
    def adapters(self) -> tuple[Tensor, ...]:
        """The adapters' matrices."""
        return self.qkv.adapters + self.out.adapters

    @property
    def all_siblings(self) -> tuple[Siblings, ...]:
        """All projections, by the input that they share."""
        return (self.qkv, self.out.o, self.out.gate_up, self.out.down)

    def weight_bytes(self, itemsize: int) -> int:
        """Return what all wide matrices take together where they stay."""
        return sum(siblings.staying_bytes(itemsize) for siblings in self.all_siblings)

    def largest_weight_bytes(self, itemsize: int) -> int:
        """Return what the largest wide matrix takes where none stays."""
        return max(siblings.passing_bytes(itemsize) for siblings in self.all_siblings)

    def quantized_bytes(self, tokens: int, tile: int) -> int:
        """Return what a product makes of its rows at most, where only qkv's are not in tiles."""
        behind = max(siblings.row_bytes for siblings in self.all_siblings[1:])
        return max(self.qkv.row_bytes * tokens, behind * (tile or tokens))

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        keep: str,
        seed: Tensor | None = None,
        passage: Passage | None = None,
    ) -> Tensor:
        """Return the next hidden states.

        Args:
            x: `[T, H]`.
            cos: `[T, R]`; sin: `[T, R]`.
            layout: Which tokens belong together.
            keep: What to save for the backward: "all", "attention", "input" or "offload" (see
                `policy`).
            seed: int64 `[2]` on the device, of the LoRA dropout masks; None drops nothing.
            passage: Moves what is offloaded, and says whether tokens are taken in tiles.
        """
        passage = passage or Passage()
        if keep == "all":
            return self._forward(x, cos, sin, layout, Keep(), seed)
        if keep == "attention" or not torch.is_grad_enabled():
            saved = Keep(everything=False, tile=passage.tile)
            return self._forward(x, cos, sin, layout, saved, seed)
        saved = Keep(everything=True, tile=passage.tile)
        # A layer that needs no gradient would not fetch its input.
        needs_grad = x.requires_grad or any(adapter.requires_grad for adapter in self.adapters)
        away = passage.send(x) if keep == "offload" and needs_grad else None
        y: Tensor = checkpoint(
            self._forward_of, away or x, cos, sin, layout, saved, seed,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), _again(saved)),
        )  # fmt: skip
        if away is not None:
            away.leave()
        return y

    def _forward_of(self, x: Tensor | Away, *rest: Any) -> Tensor:
        return self._forward(x.tensor() if isinstance(x, Away) else x, *rest)

    def _forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        keep: Keep,
        seed: Tensor | None,
    ) -> Tensor:
        into, out = self.into, self.out
        x, query, key, value = IntoAttention.apply(
            x, into, self.shape, cos, sin, seed, *into.qkv.adapters
        )
        mixed = attention(query, key, value, layout, self.scale, self.window)
        if not 0 < keep.tile < x.shape[0]:
            return OutOfAttention.apply(mixed, x, out, self.shape, keep, seed, *out.adapters)

        def half(mixed: Tensor, x: Tensor, keep: Keep, seed: Tensor | None) -> Tensor:
            return OutOfAttention.apply(mixed, x, out, self.shape, keep, seed, *out.adapters)

        return Tiled.apply(mixed, x, half, self.all_siblings[1:], keep, seed, *out.adapters)

    def _siblings(self, salt: int, *modules: nn.Module) -> Siblings:
        dropout = max(map(dropout_of, modules))
        return self.siblings(tuple(_projection(module) for module in modules), dropout, salt)


class Fp8Layer(FusedLayer):
    """The same with its large products in eight bits."""

    siblings = staticmethod(fp8_siblings)


@contextlib.contextmanager
def _again(keep: Keep) -> Iterator[None]:
    """Say that a forward runs only for what it saves, with the attention that it had before."""
    keep.is_again = True
    try:
        # The backward runs outside of the context that the body's forward had entered.
        with backends():
            yield
    finally:
        keep.is_again = False


def _head_norm(shape: BlockShape, norms: tuple[Norm, Norm] | None) -> Norm | None:
    """Return the norm of all query and key heads, from those of one query and one key head."""
    if norms is None:
        return None
    counts = (shape.num_heads, shape.num_key_value_heads)
    rows = [norm.weight.expand(count, -1) for norm, count in zip(norms, counts, strict=True)]
    return Norm(torch.cat(rows), norms[0].eps)


def dropout_of(module: Any) -> float:
    """Return the dropout of a projection's active adapter; 0 without one."""
    dropouts = getattr(module, "lora_dropout", {})
    active = [name for name in getattr(module, "active_adapters", ()) if name in dropouts]
    return float(getattr(dropouts[active[0]], "p", 0.0)) if active else 0.0


def _projection(module: Any) -> Projection:
    """Return a linear layer, adapted or not, as the engine's value."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = base.quantized if isinstance(base, NF4Linear) else base.weight
    active = [name for name in getattr(module, "active_adapters", ()) if name in module.lora_A]
    if not active or module.disable_adapters:
        return Projection(weight, base.bias)
    name = active[0]
    return Projection(
        weight,
        base.bias,
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        module.scaling[name],
    )
