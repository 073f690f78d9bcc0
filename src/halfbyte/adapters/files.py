"""An adapter folder as read from disk, refused where it is not what peft would have written."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbyte.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
IDENTITY_FILE = "halfbyte.json"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NAME_INSIDE = re.compile(r"\.lora_[AB]\.(?!weight$|bias$)([^.]+)\.(weight|bias)$")
_AGAIN = "save the adapter again, or copy it again from where it came"


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds.

    Attributes:
        folder: Where it was read.
        config: The settings.
        tensors: The weights by peft's names, on the CPU, all finite.
        identity: What `halfbyte.json` says about the base; empty where peft saved the adapter.
    """

    folder: Path
    config: peft.LoraConfig
    tensors: dict[str, Tensor]
    identity: dict[str, Any]


def read_adapter_files(folder: str | Path) -> AdapterFiles:
    """Read and check an adapter: a folder, or a name on the hub.

    Raises:
        AdapterError: a file is missing or damaged, the adapter is not LoRA, its tensors' names
            hold an adapter's name, or a value is NaN or Inf.
    """
    path = _locate(folder)
    config = _read_config(path)
    tensors = _read_tensors(path)
    identity_file = path / IDENTITY_FILE
    identity = _read_json(identity_file) if identity_file.is_file() else {}
    return AdapterFiles(path, config, tensors, identity)


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Check that no tensor holds NaN or Inf.

    Raises:
        AdapterError: names the first that does.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"{name} of {where} holds NaN or Inf",
                hint="the training diverged: use an earlier checkpoint, or a lower learning rate",
            )


def _locate(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if isinstance(folder, str) and _HUB_NAME.fullmatch(folder):
        wanted = [CONFIG_FILE, WEIGHTS_FILE, IDENTITY_FILE]
        try:
            return Path(snapshot_download(folder, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"{folder!r} is no folder here, and the hub did not give it: {error}",
                hint="check the spelling, and the connection",
            ) from error
    raise AdapterError(
        f"expected a folder with an adapter, found none at {path}",
        hint=f"give the folder that holds {CONFIG_FILE}",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}", hint=_AGAIN) from error
    if not isinstance(content, dict):
        raise AdapterError(
            f"{path} must hold a JSON object, got {type(content).__name__}", hint=_AGAIN
        )
    return content


def _read_config(folder: Path) -> peft.LoraConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(
            f"{folder} holds no {CONFIG_FILE}, so it is no adapter",
            hint="give the folder that an adapter was saved to",
        )
    content = _read_json(path)
    if content.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path} is of peft_type {content.get('peft_type')!r}, expected 'LORA'",
            hint="Halfbyte trains and loads LoRA adapters",
        )
    try:
        config = peft.LoraConfig.from_peft_type(**content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise AdapterError(f"{path} has settings that do not fit: {error}", hint=_AGAIN) from error
    if config.target_modules is None and config.target_parameters is None:
        raise AdapterError(f"{path} names no target_modules", hint=_AGAIN)
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        has_pickle = (folder / "adapter_model.bin").is_file()
        raise AdapterError(
            f"{folder} holds no {WEIGHTS_FILE}" + (", only a pickle" if has_pickle else ""),
            hint="load it with peft and save it again: that writes safetensors"
            if has_pickle
            else _AGAIN,
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}", hint=_AGAIN) from error
    for name in tensors:
        if inside := _NAME_INSIDE.search(name):
            raise AdapterError(
                f"{path} names the tensor {name!r}, with the adapter's name {inside[1]!r} inside",
                hint="peft would drop it silently: save the adapter with save_adapter or peft",
            )
    check_finite(tensors, str(path))
    return tensors
