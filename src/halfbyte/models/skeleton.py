"""A model without its weights, matched with the tensors of its folder before any is read.

transformers fills what a checkpoint lacks with random numbers and a line in a report; here a
missing or misshapen tensor is an error, found from names and headers alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoint.header import AGAIN, read_json
from halfbyte.checkpoint.reader import CheckpointReader, inside
from halfbyte.errors import CheckpointError
from halfbyte.quant.layout import STATE_SUFFIXES, SUFFIXES

# What configurations and models raise when a setting makes no sense.
_SENSELESS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
)
# More than any model has; without weights there is nothing else to check the number against.
_MOST_LAYERS = 2000
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, and where its tensors are.

    Attributes:
        config: The model's configuration; `quantization_config` is taken out.
        model: The model, without memory.
        reader: The tensors of its folder.
        names: Name on disk to name in memory, for tensors that load as they are. A weight in
            four bits is named once, without its scales.
        converted: Names on disk of tensors that are put together when they load (experts).
        unknown: Names on disk that the model has no place for.
        packed: Names on disk of the weights that are in four bits.
        quantization: What config.json says about quantization, or None.
    """

    config: PreTrainedConfig
    model: Any
    reader: CheckpointReader
    names: dict[str, str]
    converted: list[str]
    unknown: list[str]
    packed: set[str]
    quantization: dict[str, Any] | None


def read_skeleton(folder: Path) -> Skeleton:
    """Read config and headers of a folder, and check that they describe one model.

    Raises:
        CheckpointError: config.json or the weights are missing or damaged, contradict each other,
            need code of their own, or are quantized in another way than bitsandbytes' four bits.
    """
    settings = _read_settings(folder)
    _check_generation(folder)
    reader = CheckpointReader(folder)
    quantization = settings.pop("quantization_config", None)
    config, model = _build(folder, len(reader.names()))
    names = reader.names()
    packed = {
        name.removesuffix(suffix)
        for name in names
        for suffix in STATE_SUFFIXES
        if name.endswith(suffix)
    }
    _check_quantization(folder, quantization, packed)
    scales = {name + suffix for name in packed for suffix in SUFFIXES if suffix}
    names = [name for name in names if name not in scales]
    matched, converted, made = _match(model, names)
    skeleton = Skeleton(
        config=config,
        model=model,
        reader=reader,
        names=matched,
        converted=converted,
        unknown=sorted(set(names) - set(matched) - set(converted)),
        packed=packed,
        quantization=quantization,
    )
    _check_names(skeleton, made)
    _check_shapes(skeleton)
    return skeleton


@dataclass(frozen=True)
class Outline:
    """What config.json alone says.

    Attributes:
        config: The model's configuration; `quantization_config` is taken out.
        model: The model on the meta device.
        quantization: What config.json says about quantization, or None.
    """

    config: PreTrainedConfig
    model: Any
    quantization: dict[str, Any] | None


def read_outline(folder: Path) -> Outline:
    """Build the model that config.json describes, without looking for its weights.

    Raises:
        CheckpointError: config.json is missing or damaged, needs code of its own, or has sizes that
            no model has.
    """
    quantization = _read_settings(folder).get("quantization_config")
    config, model = _build(folder, _MOST_LAYERS)
    return Outline(config, model, quantization)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return config.json, if nothing in it asks for foreign code or files."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder", hint="check the path")
    path = inside(folder, "config.json")
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no config.json", hint="give the folder of a transformers model"
        )
    settings = read_json(path)
    model_type = settings.get("model_type")
    if "auto_map" in settings and model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path} asks for code that comes with the model ({model_type!r}), which is never run",
            hint="take a model that transformers itself knows",
        )
    if "transformers_weights" in settings:
        raise CheckpointError(f"{path} names its weights in 'transformers_weights'", hint=AGAIN)
    attention = settings.get("attn_implementation", settings.get("_attn_implementation"))
    if attention is not None and "/" in str(attention):
        raise CheckpointError(f"{path} asks for the attention code {attention!r} of the hub")
    return settings


def _check_generation(folder: Path) -> None:
    """Refuse a generation_config.json that transformers stumbles over when it loads the weights."""
    path = folder / "generation_config.json"
    if not path.exists():
        return
    read_json(inside(folder, path.name))
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except _SENSELESS as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="remove it, or copy it again"
        ) from error


def _build(folder: Path, num_tensors: int) -> tuple[PreTrainedConfig, Any]:
    """Build the model that config.json describes, without memory."""
    hint = "config.json is damaged, or describes a model that this transformers does not know"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        _check_sizes(folder, config, num_tensors)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except _SENSELESS as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"no language model can be built from {folder / 'config.json'}: {reason}", hint=hint
        ) from error
    return config, model


def _check_sizes(folder: Path, config: PreTrainedConfig, num_tensors: int) -> None:
    """Refuse sizes that would take forever to build; the rest shows in the shapes."""
    text = config.get_text_config()
    sizes = {name: getattr(text, name, 1) for name in _SIZES}
    senseless = {name: size for name, size in sizes.items() if isinstance(size, int) and size < 1}
    if senseless or sizes["num_hidden_layers"] > num_tensors:
        raise CheckpointError(
            f"{folder / 'config.json'} says {senseless or sizes}, and there are {num_tensors} "
            "tensors",
            hint=AGAIN,
        )


def _check_quantization(folder: Path, quantization: Any, packed: set[str]) -> None:
    if quantization is not None:
        if not isinstance(quantization, dict):
            raise CheckpointError(f"{folder}: quantization_config is {quantization!r}", hint=AGAIN)
        method = quantization.get("quant_method", "bitsandbytes")
        if method != "bitsandbytes" or not quantization.get("load_in_4bit", False):
            raise CheckpointError(
                f"{folder} is quantized with {method!r}, expected 16-bit weights or bitsandbytes' "
                "4-bit ones",
                hint="take the model that it was made from",
            )
    if (quantization is not None) != bool(packed):
        says = "says that the weights are" if quantization is not None else "does not say that"
        raise CheckpointError(
            f"config.json in {folder} {says} in 4 bits, and {len(packed)} weights are",
            hint=AGAIN,
        )


def _match(model: Any, names: list[str]) -> tuple[dict[str, str], list[str], set[str]]:
    """Return names on disk to names in memory, names that are converted, and what they make."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    matched: dict[str, str] = {}
    converted: list[str] = []
    made: set[str] = set()
    for name in names:
        there, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if there not in state and name in state:
            there, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is not None:
            converted.append(name)
            # A converter that makes several tensors is found by the first one.
            targets = next(c.target_patterns for c in converters if pattern in c.source_patterns)
            made |= {there.replace(targets[0], target) for target in targets}
        elif there in state:
            matched[name] = there
    return matched, converted, made


def _check_names(skeleton: Skeleton, made: set[str]) -> None:
    """Check that each tensor of the model is there, or made from others, or tied to one."""
    state = skeleton.model.state_dict()
    there = set(skeleton.names.values()) | made
    # Of two tied tensors either may be the one that was saved.
    for twins in skeleton.model.all_tied_weights_keys.items():
        there |= set(twins) if there & set(twins) else set()
    missing = sorted(set(state) - there)
    if missing:
        raise CheckpointError(
            f"{skeleton.reader.folder} lacks {len(missing)} of the model's {len(state)} tensors, "
            f"among them {missing[0]!r}",
            hint="the download is incomplete, or config.json belongs to another model",
        )


def _check_shapes(skeleton: Skeleton) -> None:
    """Check shapes as far as headers tell them; that of a 4-bit weight is in its state tensor."""
    state = skeleton.model.state_dict()
    for name, target in skeleton.names.items():
        expected, found = tuple(state[target].shape), skeleton.reader.info(name).shape
        if name not in skeleton.packed and expected != found:
            raise CheckpointError(
                f"expected {name!r} to be {list(expected)} as in config.json, got {list(found)}",
                hint="the weights belong to another model than config.json: copy both again",
            )


def conv1d_weights(model: Any) -> set[str]:
    """Return the names of the weights that are `[in, out]` (those of transformers' Conv1D)."""
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }
