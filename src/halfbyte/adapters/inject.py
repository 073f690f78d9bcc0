"""Put LoRA adapters on a model through peft, with settings and targets checked first."""

import contextlib
import copy
import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, cast

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from halfbyte.adapters.checks import check_settings, check_targets
from halfbyte.adapters.layer import LoraLinear
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.quant.linear import NF4Linear

_FAST_BASES = (nn.Linear, NF4Linear)


def _make_layer(
    target: nn.Module, adapter_name: str, config: peft.LoraConfig, **kwargs: Any
) -> LoraLinear | None:
    """Return our layer around `target`, or None where peft should choose its own."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    is_parameter = kwargs.get("parameter_name") is not None
    if type(base) not in _FAST_BASES or config.fan_in_fan_out or is_parameter:
        return None
    return LoraLinear(target, adapter_name, config=config, **kwargs)


def _use_our_layers(config: peft.LoraConfig) -> None:
    # Not a field of the config, so it reaches neither its repr nor adapter_config.json.
    config._register_custom_module(dict.fromkeys(_FAST_BASES, _make_layer))  # type: ignore[arg-type]


class LoraConfig(peft.LoraConfig):
    """peft's LoraConfig; peft's own functions, given this one, build Halfbyte's fast layers."""

    def __post_init__(self) -> None:
        """Check the settings (peft), then ask peft for our layers."""
        super().__post_init__()
        _use_our_layers(self)


def add_lora(
    model: nn.Module,
    config: peft.LoraConfig | None = None,
    *,
    adapter: str = "default",
    seed: int | None = None,
    **fields: Any,
) -> PeftModel:
    """Freeze `model`, put new LoRA adapters on it in place, and return peft's wrapper around it.

    Where they are not given, `target_modules` is "all-linear" (every linear layer but the output
    embedding) and `task_type` is "CAUSAL_LM". Adapters are float32. See LoRA, arXiv 2106.09685, and
    QLoRA, arXiv 2305.14314, for why all layers.

    Args:
        model: A transformers model, in 4 bits or not.
        config: peft's LoraConfig; it is copied.
        adapter: Name of the adapter.
        seed: Makes the initial adapters reproducible, without touching the global generators.
        **fields: The config's fields, instead of `config`.

    Raises:
        ConfigError: a setting is unknown or out of range.
        AdapterError: the model already has adapters, or a target matches nothing in it.
    """
    if isinstance(model, PeftModel):
        raise AdapterError(
            f"the model already has adapters: {sorted(model.peft_config)}",
            hint="use model.add_adapter(name, config) for another one",
        )
    with seeded(seed):
        return attach(model, _complete(_resolve(config, fields)), adapter)


def attach(model: nn.Module, config: peft.LoraConfig, adapter: str) -> PeftModel:
    """Check a config against a model, and put its adapters on it; see `add_lora`.

    Where the model is peft's already, this adds one more adapter, which is not active.

    Raises:
        ConfigError: a setting is out of range.
        AdapterError: a target matches nothing in the model.
    """
    check_settings(config)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_targets(base, config)
    _use_our_layers(config)
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        # Reentrant checkpointing drops all gradients of a block whose inputs need none.
        cast(Any, base).enable_input_require_grads()
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
        return model
    return cast(PeftModel, get_peft_model(cast(Any, model), config, adapter_name=adapter))


def use_fast_layers(model: nn.Module) -> int:
    """Make peft's LoRA layers on linear layers fast, in place, and return how many became so.

    For models that peft's `get_peft_model` or `PeftModel.from_pretrained` adapted with peft's own
    LoraConfig. Parameters, hooks and names stay: `LoraLinear` only adds methods to peft's class.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is lora.Linear and type(module.base_layer) in _FAST_BASES
    ]
    for layer in layers:
        layer.__class__ = LoraLinear
    return len(layers)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return `(trainable, all)` parameters, a 4-bit weight counted by its elements.

    peft's `print_trainable_parameters` counts the bytes of a 4-bit weight, two elements each.
    """
    packed = {
        id(m.weight): m for m in model.modules() if isinstance(m, NF4Linear) and m.is_quantized
    }
    trainable = total = 0
    for parameter in model.parameters():
        layer = packed.get(id(parameter))
        numel = layer.in_features * layer.out_features if layer else parameter.numel()
        total += numel
        trainable += numel if parameter.requires_grad else 0
    return trainable, total


def _resolve(config: peft.LoraConfig | None, fields: dict[str, Any]) -> peft.LoraConfig:
    known = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"LoRA has no setting {name!r}",
                hint=f"did you mean {near[0]!r}?"
                if near
                else "see peft's LoraConfig for the names",
            )
    if config is not None and fields:
        raise ConfigError(
            f"expected a config or its fields, got both (fields: {sorted(fields)})",
            hint="put all settings into the config",
        )
    if config is not None:
        return copy.deepcopy(config)
    try:
        return LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"LoRA settings do not fit together: {error}") from error


def _complete(config: peft.LoraConfig) -> peft.LoraConfig:
    if config.target_modules is None and config.target_parameters is None:
        config.target_modules = "all-linear"
    if config.task_type is None:
        config.task_type = "CAUSAL_LM"
    return config


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the generators inside the block, and restore them after it."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
