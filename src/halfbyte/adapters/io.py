"""Adapters to disk and back: peft's two files, written whole and loaded strictly.

`adapter_model.safetensors` and `adapter_config.json` are exactly peft's, for any peft, vLLM or
llama.cpp to read. What peft has no key for (the base's fingerprint, its quantization, versions)
stands beside them in `halfbyte.json`.
"""

import contextlib
import importlib.metadata
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from halfbyte.adapters import files
from halfbyte.adapters.identity import base_fingerprint, is_same_base, quantized_format
from halfbyte.adapters.inject import attach, seeded
from halfbyte.checkpoint.publish import publish
from halfbyte.errors import AdapterError, HalfbyteError

_PACKAGES = ("halfbyte", "torch", "transformers", "peft")
_EMBEDDINGS = ("embed_tokens", "lm_head")  # peft's EMBEDDING_LAYER_NAMES
_ADAPTER_PARTS = ("lora_", "modules_to_save", "token_adapter")
_NUM_LISTED = 5
# What peft raises for settings that do not fit the model.
_PEFT_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
)


def save_adapter(
    model: PeftModel, folder: str | Path, *, adapter: str = "default", overwrite: bool = False
) -> Path:
    """Write one adapter into a directory of its own, which appears whole or not at all.

    Raises:
        AdapterError: the model has no such adapter, or it holds NaN or Inf.
        CheckpointError: the folder exists (and `overwrite` is false), or cannot be written.
    """
    with publish(Path(folder), overwrite=overwrite) as partial:
        write_adapter(model, partial, adapter=adapter)
    return Path(folder)


def write_adapter(model: PeftModel, folder: Path, *, adapter: str = "default") -> None:
    """Write an adapter's files into a directory that may hold others, each file whole.

    Raises:
        AdapterError: the model has no such adapter, or it holds NaN or Inf.
    """
    description = describe_adapter(model, adapter)
    write_tensors(_host_copy(adapter_tensors(model, adapter)), description, folder)


def write_tensors(
    tensors: dict[str, Tensor], description: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    """Write what `adapter_tensors` (on the CPU, contiguous) and `describe_adapter` returned.

    Raises:
        AdapterError: a tensor holds NaN or Inf.
    """
    files.check_finite(tensors, "the adapter")
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder / files.WEIGHTS_FILE) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    for name, content in description.items():
        with _replacing(folder / name) as path:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    trainable: bool = False,
    adapter: str = "default",
    allow_other_base: bool = False,
) -> PeftModel:
    """Put a saved adapter on `model`, in place, with the very values that were saved.

    Args:
        model: The base, in 4 bits or not, or one that has other adapters already.
        folder: Where the adapter is: a folder that Halfbyte or peft wrote, or a name on the hub.
        trainable: Train it further; otherwise it is frozen and the model is in evaluation mode.
        adapter: The name it gets on the model.
        allow_other_base: Load it although it was trained on another base.

    Raises:
        AdapterError: the files are damaged, or the adapter does not fit this model: says where. The
            model is then without the adapter, as before.
    """
    found = files.read_adapter_files(folder)
    if isinstance(model, PeftModel) and adapter in model.peft_config:
        raise AdapterError(
            f"the model already has an adapter {adapter!r}", hint="choose another name for it"
        )
    if not allow_other_base:
        _check_base(model, found)
    found.config.inference_mode = not trainable
    needs_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with seeded(0):  # Initial values are overwritten, and leave the global generators alone.
            adapted = attach(model, found.config, adapter)
    except HalfbyteError:
        raise
    except _PEFT_ERRORS as error:
        raise AdapterError(
            f"peft cannot build the adapter in {found.folder} on this model: {error}",
            hint="it was saved for another model, or by another version of peft",
        ) from error
    try:
        _set_tensors(adapted, found, adapter)
    except AdapterError:
        _detach(adapted, model, adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needs_grad[name])
        raise
    return adapted if trainable else adapted.eval()


def restore_adapter(model: PeftModel, folder: str | Path, *, adapter: str = "default") -> None:
    """Put saved values into an adapter that the model has already, as resuming a run does.

    Raises:
        AdapterError: the files are damaged, or are not of an adapter like the model's.
    """
    _set_tensors(model, files.read_adapter_files(folder), adapter)


def describe_adapter(model: PeftModel, adapter: str = "default") -> dict[str, dict[str, Any]]:
    """Return an adapter's JSON files by name; training does not change them.

    Raises:
        AdapterError: the model has no such adapter.
    """
    names = sorted(model.peft_config) if isinstance(model, PeftModel) else []
    if adapter not in names:
        raise AdapterError(
            f"expected an adapter {adapter!r} on the model, found {names}",
            hint="add one first: model = halfbyte.add_lora(model)",
        )
    # The configuration comes last: with it the folder is an adapter.
    return {files.IDENTITY_FILE: _identity(model), files.CONFIG_FILE: _config(model, adapter)}


def adapter_tensors(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """Return the adapter's tensors under peft's names, where they are: training changes them."""
    state = get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=_saves_embeddings(model, adapter)
    )
    return {name: tensor.detach() for name, tensor in state.items()}


def _host_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, contiguous, sharing nothing."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _saves_embeddings(model: PeftModel, adapter: str) -> bool:
    """Whether the embeddings go along: adapted, or resized (as peft decides, but offline)."""
    config: Any = model.peft_config[adapter]
    if getattr(config, "trainable_token_indices", None) is not None:
        return False
    if any(name in _EMBEDDINGS for name in config.target_modules or ()):
        return True
    base = cast(Any, model.get_base_model())
    try:
        original = AutoConfig.from_pretrained(base.name_or_path, local_files_only=True)
    except (OSError, ValueError, AttributeError):
        return False
    return getattr(original, "vocab_size", None) != getattr(base.config, "vocab_size", None)


def _config(model: PeftModel, adapter: str) -> dict[str, Any]:
    """Return what stands in adapter_config.json: peft's keys, sets sorted, the base named."""
    config = model.peft_config[adapter]
    base_config = getattr(model.get_base_model(), "config", None)
    content = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    content["inference_mode"] = True
    content["base_model_name_or_path"] = _base_name(model)
    content["revision"] = config.revision or getattr(base_config, "_commit_hash", None)
    return content


def _base_name(model: nn.Module) -> str | None:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base, "name_or_path", None) or None


def _identity(model: PeftModel) -> dict[str, Any]:
    base_config = getattr(model.get_base_model(), "config", None)
    quantization: Any = getattr(base_config, "quantization_config", None)
    return {
        "version": 1,
        "base": {"name_or_path": _base_name(model), "fingerprint": base_fingerprint(model)},
        "quantization": quantization.to_dict() if quantization else None,
        "weights": quantized_format(model),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


@contextlib.contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    """Yield a path beside `final`; what was written there takes its place at the end."""
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def _check_base(model: nn.Module, found: files.AdapterFiles) -> None:
    """Refuse an adapter whose fingerprint is of another base."""
    base: Any = found.identity.get("base")
    recorded = base.get("fingerprint") if isinstance(base, dict) else None
    present = base_fingerprint(model) if isinstance(recorded, dict) else None
    if recorded is None or present is None or is_same_base(recorded, present):
        return
    raise AdapterError(
        f"the adapter in {found.folder} was trained on {base.get('name_or_path')!r}, "
        f"and this model, {_base_name(model)!r}, has other weights",
        hint="load it on its own base, or pass allow_other_base=True if you know that it fits",
    )


def _set_tensors(model: PeftModel, found: files.AdapterFiles, adapter: str) -> None:
    """Copy the saved values into the adapter's parameters, all of them and nothing else."""
    current = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    wrong = [
        f"{name} is {list(tensor.shape)}, expected {list(current[name].shape)}"
        for name, tensor in found.tensors.items()
        if name in current and tensor.shape != current[name].shape
    ]
    _refuse(found, "has tensors of another shape", wrong)
    try:
        result: Any = set_peft_model_state_dict(model, dict(found.tensors), adapter_name=adapter)
    except KeyError as error:
        _refuse(found, "lacks tensors that the model has", [str(error)])
        raise
    _refuse(found, "has tensors that the model lacks", result.unexpected_keys)
    _refuse(found, "lacks tensors that the model has", _of_adapter(result.missing_keys, adapter))


def _of_adapter(names: list[str], adapter: str) -> list[str]:
    return [
        name
        for name in names
        if adapter in name.split(".") and any(part in name for part in _ADAPTER_PARTS)
    ]


def _refuse(found: files.AdapterFiles, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
        raise AdapterError(
            f"the adapter in {found.folder} {what}: {', '.join(names[:_NUM_LISTED])}{more}",
            hint="it was saved for another model, or its files are damaged",
        )


def _detach(adapted: PeftModel, model: nn.Module, adapter: str) -> None:
    """Take the adapter off again."""
    if adapted is model:
        adapted.delete_adapter(adapter)
    else:
        cast(Any, adapted).unload()
