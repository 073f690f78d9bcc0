"""Refuse LoRA settings that are out of range, and targets that the model does not have."""

import copy
import difflib
import re

import peft
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import AdapterError, ConfigError
from halfbyte.quant.linear import NF4Linear

# What peft can put LoRA on.
_ADAPTABLE = (
    nn.Linear,
    Conv1D,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
    BaseTunerLayer,
)
# Initialisations that leave the base weight as it is; the others rewrite it in 16 bits.
_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


def check_settings(config: peft.LoraConfig) -> None:
    """Check rank, alpha and dropout.

    Raises:
        ConfigError: one is out of range.
    """
    for name, rank in {"r": config.r, **(config.rank_pattern or {})}.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError(
                f"the rank {name!r} must be a whole number of at least 1, got {rank!r}",
                hint="r=16 is a good start",
            )
    for name, alpha in {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})}.items():
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
            raise ConfigError(
                f"{name!r} must be a positive number, got {alpha!r}",
                hint="the update is scaled by lora_alpha / r: lora_alpha=2*r is a good start",
            )
    dropout = config.lora_dropout
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(
            f"lora_dropout is a probability in [0, 1), got {dropout!r}",
            hint="0 is the fastest; 0.05 is usual",
        )


def check_targets(model: nn.Module, config: peft.LoraConfig) -> None:
    """Check that each target of `config` matches a layer that peft can adapt.

    Raises:
        AdapterError: a target matches nothing, or something else; names what is there.
    """
    modules = dict(model.named_modules())
    has_4bit = any(isinstance(module, NF4Linear) for module in modules.values())
    if has_4bit and config.init_lora_weights not in _INITS_THAT_KEEP_THE_BASE:
        raise AdapterError(
            f"init_lora_weights={config.init_lora_weights!r} rewrites the base weight, which is in "
            "4 bits here",
            hint="load the model with quant=None, or leave init_lora_weights out",
        )
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return
    matched: set[str] = set()
    for target in [targets] if isinstance(targets, str) else sorted(targets):
        found = _matches(target, modules, config, is_pattern=isinstance(targets, str))
        if not found:
            raise AdapterError(
                f"the target {target!r} matches no layer of the model; its linear layers are: "
                f"{', '.join(_suffixes(modules))}",
                hint=_suggestion(target, modules),
            )
        matched |= found
    for name in sorted(matched):
        if not isinstance(modules[name], _ADAPTABLE):
            raise AdapterError(
                f"expected a linear layer, got the target {name!r}, a "
                f"{type(modules[name]).__name__}; the linear layers are: "
                f"{', '.join(_suffixes(modules))}",
                hint="name layers, not the blocks that hold them",
            )


def _matches(
    target: str, modules: dict[str, nn.Module], config: peft.LoraConfig, *, is_pattern: bool
) -> set[str]:
    """Return the modules that peft would adapt if `target` were the only target."""
    single = copy.copy(config)
    single.target_modules = target if is_pattern else [target]
    try:
        return {name for name in modules if name and check_target_module_exists(single, name)}
    except re.error as error:
        raise AdapterError(
            f"target_modules {target!r} is not a regular expression: {error}",
            hint="use a list of layer names, a regular expression, or 'all-linear'",
        ) from error


def _suffixes(modules: dict[str, nn.Module]) -> list[str]:
    """Return the last parts of the names of all linear layers, those with adapters included."""
    names = {
        name.removesuffix(".base_layer")
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name
    }
    return sorted({name.rpartition(".")[2] for name in names})


def _suggestion(target: str, modules: dict[str, nn.Module]) -> str:
    near = difflib.get_close_matches(target, _suffixes(modules), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "use names from this list, or 'all-linear'"
