"""Load a language model and its tokenizer, in four bits or in sixteen.

The folder is checked from its headers first; then transformers' `from_pretrained` builds the model,
and layers become 4-bit while it does (see `halfbyte.quant.quantizer`). What is quantized on the way
is read ahead of it (see `halfbyte.checkpoint.ahead`).
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import halfbyte
from halfbyte.checkpoint.ahead import ReadAhead
from halfbyte.checkpoint.header import read_json
from halfbyte.device import compute_dtype, join_memory, resolve_device
from halfbyte.errors import CheckpointError, ConfigError, DeviceError, HalfbyteError
from halfbyte.models.folder import find_folder
from halfbyte.models.skeleton import Skeleton, read_skeleton
from halfbyte.models.tokenizer import load_tokenizer
from halfbyte.quant.config import METHOD, NF4Config, to_dtype

_DEFAULT = NF4Config()
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def load(
    name_or_path: str | Path,
    *,
    quant: NF4Config | None = _DEFAULT,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    adapter: str | Path | None = None,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: A folder or a name on the hub; of a model in 16 bits, of one that bitsandbytes
            or Halfbyte saved in 4 bits, or of an adapter (its base is loaded, and it on top).
        quant: How to hold linear layers in 4 bits; None loads 16 bits, whatever is on disk. What
            is in 4 bits on disk keeps its format.
        device: Where to; by default the GPU where there is one.
        dtype: Dtype of what is not quantized; by default that of the checkpoint, and for 16-bit
            ones the 16 or 32 bits that the device multiplies well.
        adapter: Folder or hub name of an adapter to put on the model, frozen.
        attn_implementation: As in transformers, such as "sdpa" or "flash_attention_2".
        **kwargs: `revision` and `token` for the hub; anything else goes to `from_pretrained`, such
            as `device_map`.

    Returns:
        The model in evaluation mode, and the tokenizer, which has a padding token.

    Raises:
        CheckpointError: files are missing, damaged, or do not belong together.
        QuantizationError: a weight holds NaN or Inf.
        ConfigError: a setting cannot be had for this model.
        DeviceError: the device is missing or too small.
    """
    hub = {key: kwargs.pop(key, None) for key in ("revision", "token")}
    folder = find_folder(name_or_path, **hub)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        adapter, name_or_path = folder, _base_of(folder)
        folder = find_folder(name_or_path)
    join_memory()
    target = resolve_device(device)
    skeleton = read_skeleton(folder)
    settings = {
        "config": _with_quantization(skeleton, quant),
        "dtype": to_dtype("dtype", dtype) or _default_dtype(skeleton, target),
        "device_map": {"": target},
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }
    if quant is not None and skeleton.quantization is None:
        settings["quantization_config"] = quant
    if attn_implementation is not None:
        settings["attn_implementation"] = attn_implementation
    if quant is not None and skeleton.quantization is None and not kwargs:
        with ReadAhead(skeleton.reader, target) as ahead:
            settings |= {"state_dict": ahead.state_dict(), "generation_config": _generation(folder)}
            model = _from_pretrained(type(skeleton.model), folder, settings)
    else:
        model = _from_pretrained(AutoModelForCausalLM, folder, settings | kwargs)
    if quant is None and skeleton.quantization is not None:
        model.dequantize(settings["dtype"])
    model.name_or_path = model.config.name_or_path = str(name_or_path)
    has_own_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(
        Path(adapter) if adapter is not None and has_own_tokenizer else folder,
        model.get_input_embeddings().num_embeddings,
    )
    _tell_padding(model, tokenizer)
    if adapter is not None:
        # Adapters are a layer above models, so they are reached through the package.
        model = halfbyte.load_adapter(model, adapter)
    return model, tokenizer


def _base_of(adapter: Path) -> str:
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{adapter / 'adapter_config.json'} does not say what its base model is",
            hint="load the base model, and give this folder as adapter",
        )
    return base


def _default_dtype(skeleton: Skeleton, device: torch.device) -> torch.dtype:
    """Return the checkpoint's dtype, or what the device multiplies well if that has 16 bits."""
    dtype = to_dtype("dtype", getattr(skeleton.config, "dtype", None))
    if dtype is None:
        found = (skeleton.reader.info(name).dtype for name in skeleton.reader.names())
        dtype = next((each for each in found if each.is_floating_point), torch.float32)
    return compute_dtype(device) if dtype in _SIXTEEN_BITS else dtype


def _with_quantization(skeleton: Skeleton, quant: NF4Config | None) -> Any:
    """Return the model's configuration, with Halfbyte in the place of bitsandbytes."""
    config = skeleton.config
    if skeleton.quantization is not None:
        settings = dict(skeleton.quantization)
        # bitsandbytes writes float32 where nobody chose; the dtype of the model serves better.
        settings["bnb_4bit_compute_dtype"] = None if quant is None else quant.compute_dtype
        # These names would make transformers take bitsandbytes.
        for key in ("load_in_4bit", "load_in_8bit"):
            settings.pop(key, None)
        config.quantization_config = settings | {"quant_method": METHOD}
    return config


def _generation(folder: Path) -> GenerationConfig:
    """Return the folder's settings of generation, those in config.json where it has no others."""
    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", local_files_only=True, _from_model_config=True
    )


def _from_pretrained(factory: Any, folder: Path, settings: dict[str, Any]) -> Any:
    """Return the model, its tensors from `state_dict` where that is given, else from the folder."""
    source = None if "state_dict" in settings else folder
    try:
        with _bars_in_terminals_only():
            loaded: Any = factory.from_pretrained(source, output_loading_info=True, **settings)
    except HalfbyteError:
        raise
    except (ImportError, ValueError) as error:
        raise ConfigError(f"transformers cannot load {folder} like this: {error}") from error
    except RuntimeError as error:
        # OutOfMemoryError on a GPU; on a CPU it is told by the message alone.
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise DeviceError(
                f"{folder} does not fit the memory of the device: {error}",
                hint="take a smaller model, or load in 4 bits",
            ) from error
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        odd = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise CheckpointError(
            f"{len(odd)} tensors of {folder} are missing or misshapen, among them {odd[0]}",
            hint="the download is incomplete, or config.json belongs to another model",
        )
    return model


@contextlib.contextmanager
def _bars_in_terminals_only() -> Iterator[None]:
    """Keep transformers' progress out of files and pipes, where a bar is a line for each change."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _tell_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation pad with the tokenizer's token where the model names none."""
    for config in (model.config, model.generation_config):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
