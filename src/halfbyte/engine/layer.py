"""A transformers decoder layer, read once and run fused.

The layer of the model stays what and where it is; this is another way to run it, with the same
parameters. It computes causal self-attention without a key-value cache, for training and scoring.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halfbyte.engine.attention import Layout, attention
from halfbyte.engine.block import BlockShape, IntoAttention, Keep, OutOfAttention, OutWeights
from halfbyte.engine.projections import Projection, Siblings
from halfbyte.quant.linear import NF4Linear

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class FusedLayer:
    """The Llama shape of a decoder layer: pre-norm attention, pre-norm gated MLP.

    It holds the layer's tensors as they are now; after `set_adapter` or `.to(device)` make another.

    Args:
        layer: The transformers layer.
        config: The model's configuration.
        index: Of the layer; its dropout masks are its own.
    """

    def __init__(self, layer: Any, config: Any, index: int) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        self.qkv = _siblings(4 * index, attn.q_proj, attn.k_proj, attn.v_proj)
        self.out = OutWeights(
            o=_siblings(4 * index + 1, attn.o_proj),
            gate_up=_siblings(4 * index + 2, mlp.gate_proj, mlp.up_proj),
            down=_siblings(4 * index + 3, mlp.down_proj),
        )
        self.input_norm = _norm_weight(layer.input_layernorm)
        self.post_norm = _norm_weight(layer.post_attention_layernorm)
        self.scale = float(attn.scaling)
        self.shape = BlockShape(
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=int(attn.head_dim),
            intermediate_size=config.intermediate_size,
            activation=ACTIVATIONS[config.hidden_act],
            input_eps=float(layer.input_layernorm.variance_epsilon),
            post_eps=float(layer.post_attention_layernorm.variance_epsilon),
        )

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

    @property
    def weight_elements(self) -> int:
        """Elements of all wide matrices together."""
        return sum(siblings.elements for siblings in self.all_siblings)

    @property
    def largest_weight(self) -> int:
        """Elements of the largest wide matrix."""
        return max(siblings.elements for siblings in self.all_siblings)

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        keep: str,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Return the next hidden states.

        Args:
            x: `[T, H]`.
            cos: `[T, R]`; sin: `[T, R]`.
            layout: Which tokens belong together.
            keep: What to save for the backward: "all", "attention" or "input" (see `policy`).
            seed: int64 `[2]` on the device, of the LoRA dropout masks; None drops nothing.
        """
        if keep != "input" or not torch.is_grad_enabled():
            return self._forward(x, cos, sin, layout, Keep(everything=keep == "all"), seed)
        saved = Keep(everything=True)
        return checkpoint(
            self._forward, x, cos, sin, layout, saved, seed,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), _again(saved)),
        )  # fmt: skip

    def _forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        keep: Keep,
        seed: Tensor | None,
    ) -> Tensor:
        qkv, out = self.qkv, self.out
        x, query, key, value = IntoAttention.apply(
            x, qkv, self.shape, self.input_norm, cos, sin, seed, *qkv.adapters
        )
        mixed = attention(query, key, value, layout, self.scale)
        return OutOfAttention.apply(
            mixed, x, out, self.shape, self.post_norm, keep, seed, *out.adapters
        )


@contextlib.contextmanager
def _again(keep: Keep) -> Iterator[None]:
    """Say that a forward runs only for what it saves."""
    keep.is_again = True
    try:
        yield
    finally:
        keep.is_again = False


def _norm_weight(norm: Any) -> Tensor:
    weight: Tensor = norm.weight.detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _siblings(salt: int, *modules: nn.Module) -> Siblings:
    dropout = max(map(dropout_of, modules))
    return Siblings(tuple(_projection(module) for module in modules), dropout, salt)


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
