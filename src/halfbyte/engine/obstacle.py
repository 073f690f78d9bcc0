"""Why the layers of a model cannot run fused: what it has that the engine does not compute."""

from typing import Any

import torch
from torch import nn

from halfbyte.engine.attention import has_windows
from halfbyte.engine.families import ACTIVATIONS, family_of, parts_of
from halfbyte.engine.layer import dropout_of
from halfbyte.errors import ConfigError


def obstacle(model: nn.Module) -> str | None:
    """Return why a transformers body cannot run fused, or None where it can."""
    config: Any = getattr(model, "config", None)
    layers: Any = getattr(model, "layers", None)
    if layers is None or len(layers) == 0 or not hasattr(model, "rotary_emb"):
        return "its body is not embedding, layers and norm"
    unknown = {type(layer).__name__ for layer in layers if family_of(layer) is None}
    if unknown:
        return f"its layers are {', '.join(sorted(unknown))}"
    if getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout is {config.attention_dropout}"
    dropouts = set()
    for layer in layers:
        reason = _layer_obstacle(layer, config)
        if reason is not None:
            return reason
        projections = parts_of(layer, config).projections.values()
        dropouts |= {dropout_of(module) for module in projections if hasattr(module, "lora_A")}
    return None if len(dropouts) < 2 else "its adapters have different dropouts"


def require_fused(reason: str | None) -> None:
    """Refuse eight bits for a model that cannot run fused.

    Args:
        reason: Why it cannot; None where it can.

    Raises:
        ConfigError: it cannot.
    """
    if reason is not None:
        raise ConfigError(
            f"compute: fp8 needs a model that runs fused, and this one does not: {reason}",
            hint="leave compute at bf16",
        )


def _layer_obstacle(layer: Any, config: Any) -> str | None:
    """Return what of a layer of a known family is not computed, or None."""
    parts, attn = parts_of(layer, config), layer.self_attn
    if parts.activation not in ACTIVATIONS:
        return f"its activation is {parts.activation}"
    if not attn.is_causal:
        return "its attention looks ahead"
    if getattr(attn, "attn_logit_softcapping", None):
        return f"its attention scores are capped at {attn.attn_logit_softcapping}"
    if parts.window is not None and not has_windows():
        return f"its attention slides over a window, which PyTorch {torch.__version__} cannot pack"
    for name, module in layer.named_children():
        if isinstance(module, nn.Dropout) and module.p:
            return f"{name} is {module.p}"
    for name, module in parts.projections.items():
        reason = _projection_obstacle(module)
        if reason is not None:
            return f"{name} {reason}"
    return _trained_obstacle(layer)


def _trained_obstacle(layer: nn.Module) -> str | None:
    """Return what is trained beside adapters; where there are none, nothing is."""
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    others = [name for name in names if "lora_" not in name]
    return f"it trains {others[0]} beside adapters" if others and others != names else None


def _projection_obstacle(module: Any) -> str | None:
    """Return what of a projection's adapter the fused products do not compute, or None."""
    if not hasattr(module, "lora_A"):
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) > 1:
        return f"has {len(active)} active adapters"
    if module.merged:
        return "has a merged adapter"
    for name in active:
        if getattr(module, "use_dora", {}).get(name):
            return "is adapted with DoRA"
        if module.lora_B[name].bias is not None:
            return "has a bias on lora_B"
        if module.lora_A[name].weight.dtype != torch.float32:
            return f"has {module.lora_A[name].weight.dtype} adapters"
    return None
