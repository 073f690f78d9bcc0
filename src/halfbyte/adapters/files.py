"""An adapter folder as read from disk, refused where it is not what peft would have written."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from halfbyte.adapters.schema import AGAIN, check_config, check_identity
from halfbyte.checkpoint.header import TensorInfo, read_header, read_json
from halfbyte.checkpoint.reader import inside, read_tensor
from halfbyte.errors import AdapterError, CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
IDENTITY_FILE = "halfbyte.json"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_NAME_INSIDE = re.compile(r"\.lora_[AB]\.(?!weight$|bias$)([^.]+)\.(weight|bias)$")
_RANK = re.compile(r"\.lora_(A|embedding_A)(\.weight)?$")
# How much larger than the largest saved rank a setting may be: peft allocates before it compares.
_RANK_EXCESS = 16


class SavedTensors(Mapping[str, Tensor]):
    """Tensors on disk by name, read anew each time they are asked for; memory holds none of them.

    Args:
        header: What the file holds.
    """

    def __init__(self, header: Mapping[str, TensorInfo]) -> None:
        self.header = header

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return read_tensor(name, self.header[name])

    def __iter__(self) -> Iterator[str]:
        """Return the names, sorted."""
        return iter(sorted(self.header))

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self.header)


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
    tensors: Mapping[str, Tensor]
    identity: dict[str, Any]


def read_adapter_files(folder: str | Path, *, in_memory: bool = True) -> AdapterFiles:
    """Read and check an adapter.

    Args:
        folder: Where it is, or its name on the hub.
        in_memory: Hold the tensors; otherwise each is read when it is asked for.

    Raises:
        AdapterError: a file is missing or damaged, the adapter is not LoRA, its tensors' names
            hold an adapter's name, or a value is NaN or Inf.
    """
    path = _locate(folder)
    config = _read_config(path)
    saved = _open_tensors(path)
    _check_ranks(path, config, saved)
    try:
        tensors = dict(saved) if in_memory else saved
        check_finite(tensors, str(path / WEIGHTS_FILE))
    except CheckpointError as error:
        raise AdapterError(f"{path} cannot be read: {error.message}", hint=AGAIN) from error
    return AdapterFiles(path, config, tensors, _read_identity(path))


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
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


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(inside(folder, name))
    except CheckpointError as error:
        raise AdapterError(error.message, hint=AGAIN) from error


def _read_identity(folder: Path) -> dict[str, Any]:
    if not (folder / IDENTITY_FILE).exists():
        return {}
    identity = _read_json(folder, IDENTITY_FILE)
    check_identity(identity, folder / IDENTITY_FILE)
    return identity


def _read_config(folder: Path) -> peft.LoraConfig:
    path = folder / CONFIG_FILE
    if not path.exists():
        raise AdapterError(
            f"{folder} holds no {CONFIG_FILE}, so it is no adapter",
            hint="give the folder that an adapter was saved to",
        )
    content = _read_json(folder, CONFIG_FILE)
    if content.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path} is of peft_type {content.get('peft_type')!r}, expected 'LORA'",
            hint="Halfbyte trains and loads LoRA adapters",
        )
    check_config(content, path)
    try:
        config = peft.LoraConfig.from_peft_type(**content)
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise AdapterError(f"{path} has settings that do not fit: {error}", hint=AGAIN) from error
    if config.target_modules is None and config.target_parameters is None:
        raise AdapterError(f"{path} names no target_modules", hint=AGAIN)
    return config


def _open_tensors(folder: Path) -> SavedTensors:
    path = folder / WEIGHTS_FILE
    if not path.exists():
        has_pickle = (folder / "adapter_model.bin").is_file()
        raise AdapterError(
            f"{folder} holds no {WEIGHTS_FILE}" + (", only a pickle" if has_pickle else ""),
            hint="load it with peft and save it again: that writes safetensors"
            if has_pickle
            else AGAIN,
        )
    try:
        header = read_header(inside(folder, WEIGHTS_FILE))
    except CheckpointError as error:
        raise AdapterError(f"{path} cannot be read: {error.message}", hint=AGAIN) from error
    for name in header:
        if found := _NAME_INSIDE.search(name):
            raise AdapterError(
                f"{path} names the tensor {name!r}, with the adapter's name {found[1]!r} inside",
                hint="peft would drop it silently: save the adapter with save_adapter or peft",
            )
    return SavedTensors(header)


def _check_ranks(folder: Path, config: peft.LoraConfig, saved: SavedTensors) -> None:
    """Refuse ranks far beyond those of the tensors, before memory is taken for them."""
    shapes = [info.shape for name, info in saved.header.items() if _RANK.search(name)]
    largest = max((shape[0] for shape in shapes if shape), default=0)
    asked = max([config.r, *(config.rank_pattern or {}).values()])
    if asked > _RANK_EXCESS * max(largest, 1):
        raise AdapterError(
            f"{folder / CONFIG_FILE} asks for rank {asked}, and the largest saved one is {largest}",
            hint=AGAIN,
        )
