"""Where a transformers decoder layer has its parts, and what sets its family apart from Llama.

The engine runs one shape: pre-norm attention, then a pre-norm gated MLP. A `Family` says how a
family varies it; `Parts` is one layer, so read.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from halfbyte.kernels.rms_norm import Norm

# transformers' names for the activations of `kernels.gated`.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# The rotation of an attention that does not rotate.
NO_ROPE = "none"


@dataclass(frozen=True)
class Family:
    """How a family varies the shape, in the names that transformers gives to the parts.

    Args:
        qkv: Projections of `self_attn` before attention.
        gate_up: Projections of `mlp` before the activation.
        mlp_norm: Norm before the MLP.
        branch_norms: Norms of what attention and the MLP give, before it is added; or none.
        has_head_norms: Whether `self_attn` has a `q_norm` and a `k_norm`, of each head.
        adds_one: Whether norms multiply with 1 + weight.
        activation: The setting that names the activation.
        all_slide: Whether the configuration's `sliding_window` is that of every layer.
        has_ropes: Whether each of the configuration's `layer_types` has its own rotation.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_norm: str = "post_attention_layernorm"
    branch_norms: tuple[str, str] | None = None
    has_head_norms: bool = False
    adds_one: bool = False
    activation: str = "hidden_act"
    all_slide: bool = False
    has_ropes: bool = False


_GEMMA_2 = Family(
    mlp_norm="pre_feedforward_layernorm",
    branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    adds_one=True,
    activation="hidden_activation",
)
_FAMILIES = {
    "Gemma": Family(adds_one=True),
    "Gemma2": _GEMMA_2,
    "Gemma3": replace(_GEMMA_2, has_head_norms=True, has_ropes=True),
    "Llama": Family(),
    "Ministral": Family(),
    "Mistral": Family(all_slide=True),
    "Phi3": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",), all_slide=True),
    "Qwen2": Family(),
    "Qwen3": Family(has_head_norms=True),
    "SmolLM3": Family(),
}


@dataclass(frozen=True)
class Parts:
    """A decoder layer, taken apart.

    Args:
        qkv, gate_up: Projections by name: three and two, or one each whose outputs are theirs side
            by side.
        o, down: Projections.
        input_norm, mlp_norm: Before attention and before the MLP.
        head_norms: Of each query head and of each key head, weights `[D]`; or None.
        branch_norms: Of what attention and the MLP give, before it is added; or None.
        activation: As the configuration names it.
        window: How many tokens a token sees, itself one of them; None: all before it.
        rope: Which of the model's rotations: a layer type, `NO_ROPE`, or None where there is one.
    """

    qkv: dict[str, nn.Module]
    o: nn.Module
    gate_up: dict[str, nn.Module]
    down: nn.Module
    input_norm: Norm
    mlp_norm: Norm
    head_norms: tuple[Norm, Norm] | None
    branch_norms: tuple[Norm, Norm] | None
    activation: str
    window: int | None
    rope: str | None

    @property
    def projections(self) -> dict[str, nn.Module]:
        """All of them, by name."""
        return {**self.qkv, "o_proj": self.o, **self.gate_up, "down_proj": self.down}


def text_part(model: Any) -> Any:
    """Return the body of a model that reads tokens: of a multimodal one its language model."""
    body = getattr(model, model.base_model_prefix, None)
    return getattr(body, "language_model", body)


def family_of(module: nn.Module) -> Family | None:
    """Return the family of a decoder layer or an RMSNorm, by the name of its class, or None."""
    name = type(module).__name__
    return _FAMILIES.get(name.removesuffix("DecoderLayer").removesuffix("RMSNorm"))


def parts_of(layer: Any, config: Any) -> Parts:
    """Take a decoder layer apart, whose `family_of` is known.

    Args:
        layer: The transformers layer.
        config: The model's configuration.
    """
    family = family_of(layer) or Family()
    attn, mlp = layer.self_attn, layer.mlp

    def both(first: Any, second: Any) -> tuple[Norm, Norm]:
        return norm_of(first, family), norm_of(second, family)

    branches = family.branch_norms and [getattr(layer, name) for name in family.branch_norms]
    return Parts(
        qkv={name: getattr(attn, name) for name in family.qkv},
        o=attn.o_proj,
        gate_up={name: getattr(mlp, name) for name in family.gate_up},
        down=mlp.down_proj,
        input_norm=norm_of(layer.input_layernorm, family),
        mlp_norm=norm_of(getattr(layer, family.mlp_norm), family),
        head_norms=both(attn.q_norm, attn.k_norm) if family.has_head_norms else None,
        branch_norms=both(*branches) if branches else None,
        activation=getattr(config, family.activation),
        window=config.sliding_window if family.all_slide else getattr(attn, "sliding_window", None),
        rope=_rope(attn, family),
    )


def norm_of(norm: Any, family: Family) -> Norm:
    """Return the float32 weight and the epsilon of a family's RMSNorm."""
    weight = norm.weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if family.adds_one:
        return Norm(wide + 1, float(norm.eps))
    return Norm(wide, float(norm.variance_epsilon))


def _rope(attn: Any, family: Family) -> str | None:
    if not getattr(attn, "use_rope", True):
        return NO_ROPE
    return str(attn.layer_type) if family.has_ropes else None
