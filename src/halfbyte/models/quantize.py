"""Write a 16-bit checkpoint as a 4-bit one, from disk to disk, one tensor in memory at a time."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import tqdm

from halfbyte.checkpoint.header import read_json
from halfbyte.checkpoint.publish import publish
from halfbyte.checkpoint.reader import inside
from halfbyte.checkpoint.writer import ShardedWriter
from halfbyte.device import resolve_device
from halfbyte.errors import CheckpointError, QuantizationError
from halfbyte.models.folder import find_folder
from halfbyte.models.skeleton import Skeleton, conv1d_weights, read_skeleton
from halfbyte.quant import layout
from halfbyte.quant.config import NF4Config, to_dtype
from halfbyte.quant.quantizer import quantizable_modules
from halfbyte.quant.weight import QuantizedWeight

_log = logging.getLogger(__name__)

_DEFAULT = NF4Config()
# Other forms of the weights, indices of the old shards, and code.
_NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".index.json",
    ".py",
    ".msgpack",
    ".h5",
)
_MAX_COPIED_BYTES = 200_000_000
# The one folder that tokenizers have: chat templates with names of their own.
_TEMPLATES = "additional_chat_templates"


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    config: NF4Config = _DEFAULT,
    device: str | torch.device | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Quantize the model in a folder, or of the hub, into the folder `out`.

    The files equal those that `save_pretrained` of the loaded model writes, and appear whole or not
    at all; tokenizer and other small files are copied.

    Args:
        model: A folder or a name on the hub, with 16- or 32-bit weights.
        out: The folder to make.
        config: How to quantize.
        device: Where to quantize; by default the GPU where there is one.
        max_shard_bytes: Most bytes in a file of weights.
        overwrite: Replace a folder that is already there.

    Returns:
        The folder that was made.

    Raises:
        CheckpointError: the model's files are damaged or already quantized, or `out` exists.
        QuantizationError: a weight holds NaN or Inf; the message names it.
    """
    folder, final = find_folder(model), Path(out)
    skeleton = read_skeleton(folder)
    if skeleton.quantization is not None:
        raise CheckpointError(
            f"{folder} is in 4 bits already", hint="give the 16-bit model that it was made from"
        )
    if final.exists() and final.resolve() == folder.resolve():
        raise CheckpointError(f"{final} is the model itself", hint="choose another place")
    if skeleton.unknown:
        _log.warning(
            "%s holds %d tensors that the model does not have, such as %r: they are left out",
            folder,
            len(skeleton.unknown),
            skeleton.unknown[0],
        )
    with publish(final, overwrite=overwrite) as partial:
        _copy_small_files(folder, partial)
        _write_config(folder, partial, skeleton, config)
        with ShardedWriter(partial, max_shard_bytes) as writer:
            for name, tensor in _quantized_tensors(skeleton, config, resolve_device(device)):
                writer.add(name, tensor)
    return final


def weights_to_quantize(model: Any, config: NF4Config) -> set[str]:
    """Return the names in memory of the weights that `config` holds in 4 bits."""
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, config.skip_modules, list(model._keep_in_fp32_modules or ())
    )
    return {f"{name}.weight" for name, _ in quantizable_modules(model, skipped)}


def _quantized_tensors(
    skeleton: Skeleton, config: NF4Config, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield what is to be written under its name on disk, in the order of the state dict."""
    chosen = weights_to_quantize(skeleton.model, config)
    turned = conv1d_weights(skeleton.model)
    on_disk = {target: name for name, target in skeleton.names.items()}
    ordered = [name for name in skeleton.model.state_dict() if name in on_disk]
    for target in tqdm(ordered, desc="Quantizing"):
        name = on_disk[target]
        if target not in chosen:
            yield name, skeleton.reader.tensor(name)
            continue
        weight = skeleton.reader.tensor(name, device)
        try:
            quantized = QuantizedWeight.quantize(
                weight.T.contiguous() if target in turned else weight,
                quant_type=config.quant_type,
                block_size=config.block_size,
                double_quant=config.double_quant,
            )
        except QuantizationError as error:
            raise QuantizationError(f"{name!r}: {error.message}", hint=error.hint) from error
        del weight
        yield from layout.to_tensors(name, quantized).items()
    for name in skeleton.converted:
        yield name, skeleton.reader.tensor(name)


def _write_config(folder: Path, to: Path, skeleton: Skeleton, config: NF4Config) -> None:
    """Write config.json as it was, and how the weights are quantized."""
    settings = read_json(folder / "config.json")
    quantization = config.to_dict()
    dtype = to_dtype("dtype", getattr(skeleton.config, "dtype", None))
    if config.compute_dtype is None and dtype is not None:
        quantization["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    settings["quantization_config"] = quantization
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (to / "config.json").write_text(text, encoding="utf-8")


def _copy_small_files(folder: Path, to: Path) -> None:
    """Copy tokenizer, generation settings and papers, but no weights and no code."""
    for path in sorted(folder.iterdir()):
        is_small = path.is_file() and path.stat().st_size <= _MAX_COPIED_BYTES
        if is_small and not path.name.startswith(".") and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(inside(folder, path.name), to / path.name)
    templates = folder / _TEMPLATES
    if templates.is_dir():
        (to / _TEMPLATES).mkdir()
        _copy_small_files(templates, to / _TEMPLATES)
