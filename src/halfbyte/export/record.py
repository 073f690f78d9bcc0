"""What training left beside an adapter: where its base is, and how that was held in 4 bits.

`halfbyte.json` beside the adapter names the base, its fingerprint and its quantization; peft's
adapter_config.json names the base too. The modules that were quantized are found as the loader
finds them, by transformers' rules on the model without memory.
"""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from halfbyte.adapters.files import AdapterFiles
from halfbyte.errors import AdapterError, CheckpointError
from halfbyte.export.base import Recipe
from halfbyte.quant.config import NF4Config
from halfbyte.quant.quantizer import NF4Quantizer, quantizable_modules

_BASE_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def base_name(adapter: AdapterFiles) -> str:
    """Return the folder or hub name of the base that the adapter was trained on.

    Raises:
        AdapterError: the adapter does not say.
    """
    recorded = adapter.identity.get("base") or {}
    name = adapter.config.base_model_name_or_path or recorded.get("name_or_path")
    if not name:
        raise AdapterError(
            f"the adapter in {adapter.folder} does not name its base",
            hint="give the base with base=... (on the command line --base)",
        )
    return str(name)


def find_base(adapter: AdapterFiles, base: str | Path | None = None) -> Path:
    """Return the base's folder, fetched from the hub where it is a name there.

    Raises:
        AdapterError: the adapter does not name its base.
        CheckpointError: the base is neither a folder nor on the hub.
    """
    name = str(base) if base is not None else base_name(adapter)
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_BASE_FILES))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the base {name!r} is no folder here, and the hub did not give it",
            hint="say where it is with base=... (on the command line --base)",
        ) from error


def recorded_config(adapter: AdapterFiles) -> NF4Config | None:
    """Return how training held the base in 4 bits, None for 16 bits.

    Raises:
        AdapterError: nothing beside the adapter says so.
    """
    if not adapter.identity:
        raise AdapterError(
            f"nothing in {adapter.folder} says how training held the base",
            hint="give quant=NF4Config(...) (--quant nf4) if in 4 bits, else onto=original",
        )
    saved = adapter.identity.get("quantization")
    if saved is None:
        return None
    config = NF4Config(**saved)
    traits = _traits(adapter)
    return NF4Config(
        quant_type=config.quant_type,
        block_size=int(traits[1]) if traits else config.block_size,
        double_quant=config.double_quant,
        skip_modules=config.skip_modules,
    )


def _traits(adapter: AdapterFiles) -> list[str] | None:
    """Return (type, block size, double quantization, dtype) from the base's fingerprint."""
    fingerprint = (adapter.identity.get("base") or {}).get("fingerprint") or {}
    traits = str(fingerprint.get("quantization", "")).split("-")
    return traits if len(traits) == 4 else None


def make_recipe(config: NF4Config, model: PreTrainedModel, adapter: AdapterFiles) -> Recipe:
    """Return which modules of `model` training had in 4 bits under `config`, and how."""
    quantizer = NF4Quantizer(config, pre_quantized=False)
    in_float32 = list(model._keep_in_fp32_modules or ())
    skipped = quantizer.get_modules_to_not_convert(model, config.skip_modules, in_float32)
    traits = _traits(adapter)
    return Recipe(
        modules=frozenset(name for name, _ in quantizable_modules(model, skipped)),
        quant_type=config.quant_type,
        block_size=config.block_size,
        double_quant=config.double_quant,
        dtype=_DTYPES.get(traits[3].removeprefix("torch.")) if traits else None,
    )
