"""Which update of an adapter falls on which tensor of the base.

peft loads adapters leniently: a missing `lora_B` only warns, an unknown key is silent. A merge
would make such a mistake permanent, so here every key has its place or the adapter is refused.
Keys are `base_model.model.<module>.lora_A.weight` [rank, in], `....lora_B.weight` [out, rank], and
so on; they name modules of the model in memory.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any

import peft

from halfbyte.adapters.files import WEIGHTS_FILE, AdapterFiles
from halfbyte.errors import AdapterError
from halfbyte.export.updates import (
    BiasUpdate,
    EmbeddingUpdate,
    LoraUpdate,
    ReplaceUpdate,
    RowsUpdate,
    Update,
)

_PREFIX = "base_model.model."
# The settings of peft's LoraConfig that merging here understands, or that do not change the result.
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias",
    "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices",
    "use_dora", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ...) change it.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
_PEFT_MERGES = "merge it with peft's own merge_and_unload"
_TABLES = ("embed_tokens.weight", "lm_head.weight")  # those of peft's EMBEDDING_LAYER_NAMES
_PART = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector(?:\.weight)?|token_adapter\.trainable_tokens_delta"
    r"|base_layer\.weight|base_layer\.bias)$"
)


def check_mergeable(adapter: AdapterFiles) -> None:
    """Refuse an adapter whose settings mean something that merging here would get wrong.

    Raises:
        AdapterError: names the setting.
    """
    for field in fields(peft.LoraConfig):
        value = getattr(adapter.config, field.name)
        default = field.default if field.default is not MISSING else None
        if field.name not in _UNDERSTOOD and value and value != default:
            raise AdapterError(
                f"the adapter in {adapter.folder} uses {field.name}={value!r}, "
                "which cannot be merged here",
                hint=_PEFT_MERGES,
            )
    initialisation = adapter.config.init_lora_weights
    if initialisation not in _PLAIN_INITS:
        raise AdapterError(
            f"the adapter in {adapter.folder} began with init_lora_weights={initialisation!r}, "
            "which changes the base: added to the plain base it would be wrong",
            hint="save it with peft's path_initial_model_for_weight_conversion and merge that",
        )


def _pattern_value(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """Look `module` up as peft does: the first key that is a suffix, as a regular expression."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _rank_and_scaling(config: peft.LoraConfig, module: str) -> tuple[int, float]:
    rank = _pattern_value(config.rank_pattern or {}, module, config.r)
    alpha = _pattern_value(config.alpha_pattern or {}, module, config.lora_alpha)
    return rank, float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)


def _token_indices(config: peft.LoraConfig, module: str) -> tuple[int, ...]:
    indices = config.trainable_token_indices or []
    if isinstance(indices, dict):
        named = [rows for key, rows in indices.items() if module.endswith(key)]
        indices = named[0] if named else []
    return tuple(indices)


def updates_by_tensor(
    adapter: AdapterFiles, transposed: Collection[str] = ()
) -> dict[str, list[Update]]:
    """Return what to do to which tensor, under the names that the loaded model uses.

    Args:
        adapter: The adapter.
        transposed: Names of weights that are [in, out] (transformers' Conv1D).

    Raises:
        AdapterError: a key is unknown, half of a pair is missing, or a setting cannot be merged.
    """
    check_mergeable(adapter)
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    updates: dict[str, list[Update]] = defaultdict(list)
    for key in adapter.tensors:
        name = key.removeprefix(_PREFIX)
        match = _PART.match(name)
        if match and name != key:
            part = match["part"].removeprefix("token_adapter.")
            part = part if part == "base_layer.weight" else part.removesuffix(".weight")
            parts[match["module"]][part] = key
        elif name != key and _is_trained_copy(adapter.config, name):
            updates[name].append(ReplaceUpdate(key))
        else:
            raise AdapterError(
                f"{key} in {adapter.folder / WEIGHTS_FILE} is no LoRA tensor, nor of "
                f"modules_to_save={adapter.config.modules_to_save}",
                hint="keys look like base_model.model.<module>.lora_A.weight, with no adapter name",
            )
    for module, keys in parts.items():
        for tensor, update in _module_updates(
            adapter, module, keys, is_transposed=f"{module}.weight" in transposed
        ):
            updates[tensor].append(update)
    return dict(updates)


def _is_trained_copy(config: peft.LoraConfig, name: str) -> bool:
    parts = name.split(".")
    owners = [".".join(parts[:count]) for count in range(1, len(parts))]
    # As peft matches them: a module is saved if its name ends with one of these.
    saved = tuple(config.modules_to_save or ())
    is_saved = any(owner.endswith(saved) for owner in owners)
    # With new tokens peft saves the tables that grew, under these names alone.
    is_table = name.endswith(_TABLES)
    return is_saved or is_table or (config.bias != "none" and name.endswith(".bias"))


def _module_updates(
    adapter: AdapterFiles, module: str, keys: dict[str, str], *, is_transposed: bool
) -> list[tuple[str, Update]]:
    """Return (tensor name, update) for the keys that belong to one module."""
    for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if (one in keys) != (other in keys):
            missing = other if one in keys else one
            raise AdapterError(
                f"{adapter.folder / WEIGHTS_FILE} has no {missing} for {module}",
                hint="the file is incomplete: save the adapter again",
            )
    weight, bias = f"{module}.weight", f"{module}.bias"
    rank, scaling = _rank_and_scaling(adapter.config, module)
    updates: list[tuple[str, Update]] = []
    if "base_layer.weight" in keys:  # peft keeps the embedding itself beside its adapter
        updates.append((weight, ReplaceUpdate(keys["base_layer.weight"])))
    if "lora_A" in keys:
        magnitude = keys.get("lora_magnitude_vector")
        lora = LoraUpdate(keys["lora_A"], keys["lora_B"], rank, scaling, magnitude, is_transposed)
        updates.append((weight, lora))
    elif "lora_embedding_A" in keys:
        if "lora_magnitude_vector" in keys:
            raise AdapterError(
                f"{module} is an embedding with DoRA, which cannot be merged here",
                hint=_PEFT_MERGES,
            )
        pair = (keys["lora_embedding_A"], keys["lora_embedding_B"])
        updates.append((weight, EmbeddingUpdate(*pair, rank, scaling)))
    if "trainable_tokens_delta" in keys:
        indices = _token_indices(adapter.config, module)
        updates.append((weight, RowsUpdate(keys["trainable_tokens_delta"], indices)))
    if "base_layer.bias" in keys:
        updates.append((bias, ReplaceUpdate(keys["base_layer.bias"])))
    if "lora_B.bias" in keys:
        updates.append((bias, BiasUpdate(keys["lora_B.bias"], scaling)))
    return updates
