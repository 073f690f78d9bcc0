"""A model becomes a GGUF file: settings, tokenizer, then tensors one at a time.

The file is written beside its final name and renamed when it is whole and says the same as training
did (halfbyte.gguf.parity), so that a half-written or mute one never has the name.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from rich.console import Console
from rich.progress import track
from torch import Tensor

from halfbyte.data.formats import Example
from halfbyte.errors import CheckpointError
from halfbyte.export.config import MergeConfig
from halfbyte.gguf.families import limits, write_settings
from halfbyte.gguf.parity import Parity, check_parity
from halfbyte.gguf.source import EMBEDDING, Source, open_source
from halfbyte.gguf.types import (
    FILE_TYPES,
    FileType,
    check_file_type,
    encode,
    num_bytes,
    tensor_type,
)
from halfbyte.gguf.vocabulary import make_vocabulary, model_name

_LARGEST_F16 = 65504


@dataclass(frozen=True)
class GgufResult:
    """What an export wrote.

    Args:
        path: The file.
        architecture: llama.cpp's name of it.
        tensors: Number of tensors by type.
        num_bytes: Size of the file.
        parity: The comparison of its prompts with those of training; None for an adapter.
        notices: What the user should know.
    """

    path: Path
    architecture: str
    tensors: dict[str, int]
    num_bytes: int
    parity: Parity | None
    notices: list[str]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType


def export_gguf(
    folder: str | Path,
    to: str | Path,
    file_type: str = "f16",
    *,
    merge: MergeConfig | None = None,
    base_only: bool = False,
    conversations: Sequence[Example] = (),
    allow_differences: bool = False,
    overwrite: bool = False,
) -> GgufResult:
    """Write a model as one GGUF file.

    Args:
        folder: A run's folder (its adapter is merged on the way), or a model's.
        to: The file to write.
        file_type: f32, f16, bf16, q8_0, q4_0 or q4_k_m.
        merge: How an adapter is merged; without rows to measure on, onto the dequantized base.
        base_only: Leave the adapter out: write the base as training saw it.
        conversations: Rows of the training data, whose prompts must come out the same.
        allow_differences: Write the file although they do not.
        overwrite: Replace `to` if it is there.

    Raises:
        CheckpointError: the model cannot be exported, the disk is short, `to` is there already, or
            the file's prompts differ from training's.
        HalfbyteError: as from opening the model.
    """
    kind = check_file_type(file_type)
    check_target(Path(to), overwrite=overwrite)
    source = open_source(folder, merge, base_only=base_only)
    source.family.check(source.config, is_tied=source.is_tied)
    entries = _entries(source, kind)
    with replacing(Path(to)) as partial:
        _write(source, entries, kind, partial)
        parity = check_parity(partial, source.tokenizer, conversations)
        if parity.differences and not allow_differences:
            raise CheckpointError(
                f"prompts that are made from the GGUF file differ from training's:\n{parity}",
                hint="train with a template that both understand, or allow it with "
                "allow_differences=True (--allow-differences)",
            )
    return GgufResult(
        path=Path(to),
        architecture=source.family.name,
        tensors=count(entry.kind for entry in entries.values()),
        num_bytes=Path(to).stat().st_size,
        parity=parity,
        notices=[*(source.choice.words() if source.choice else []), *limits(source.config)],
    )


def check_target(to: Path, *, overwrite: bool) -> None:
    """Make sure that a file can be written.

    Raises:
        CheckpointError: something is there, or the folder is not.
    """
    if to.is_dir() or (to.exists() and not overwrite):
        raise CheckpointError(
            f"{to} already exists", hint="choose another name, or allow it to be overwritten"
        )
    if not to.parent.is_dir():
        raise CheckpointError(f"there is no folder {to.parent}", hint="make it first")


@contextlib.contextmanager
def replacing(to: Path) -> Iterator[Path]:
    """Yield a file beside `to` that takes its place, synced, when the block ends without an error.

    Raises:
        CheckpointError: the system could not write it.
    """
    partial = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(to)
    except OSError as error:
        raise CheckpointError(f"writing {to} failed: {error}", hint="make room") from error
    finally:
        partial.unlink(missing_ok=True)


def check_room(folder: Path, needed: int) -> None:
    """Make sure that the disk has room for `needed` bytes.

    Raises:
        CheckpointError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"the file needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free",
            hint="make room, write elsewhere, or choose a smaller type",
        )


def write_tensors(
    writer: gguf.GGUFWriter, entries: Sequence[Entry], tensors: Iterator[tuple[Entry, Tensor]]
) -> None:
    """Write the header, then the tensors as they come, with a bar in a terminal.

    Args:
        writer: Its metadata are complete; it is closed in the end.
        entries: Every tensor, in order.
        tensors: The same with their float32 values.

    Raises:
        CheckpointError: a value does not fit its type, or the disk is too small.
    """
    console = Console(stderr=True)
    try:
        for entry in entries:
            # The library takes the shape in values for every dtype but uint8.
            size, dtype = num_bytes(entry.shape, entry.kind), np.dtype(np.float32)
            writer.add_tensor_info(entry.name, entry.shape, dtype, size, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, tensor in track(
            tensors,
            "writing",
            len(entries),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            _check_range(entry, tensor)
            writer.write_tensor_data(encode(tensor.contiguous(), entry.kind))
    finally:
        writer.close()


def _check_range(entry: Entry, tensor: Tensor) -> None:
    peak = float(tensor.abs().max())
    if entry.kind == GGMLQuantizationType.F16 and peak > _LARGEST_F16:
        raise CheckpointError(
            f"{entry.name} has values of {peak:.3g}, too large for f16",
            hint="choose bf16 or q8_0",
        )


def _entries(source: Source, file_type: FileType) -> dict[str, Entry]:
    """Return the tensors of the file by their names in transformers.

    Raises:
        CheckpointError: the architecture has no place for a tensor.
    """
    layers = source.config.num_hidden_layers
    names = gguf.get_tensor_name_map(source.family.arch, layers)
    output = "token_embd.weight" if source.is_tied else "output.weight"
    entries = {}
    for name, shape in source.shapes.items():
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise CheckpointError(
                f"llama.cpp's {source.family.name} has no place for the tensor {name}",
                hint="use the merged folder with transformers or vLLM",
            )
        kind = tensor_type(there, shape, file_type, num_layers=layers, output=output)
        entries[name] = Entry(there, shape, kind)
    return entries


def _write(source: Source, entries: dict[str, Entry], file_type: FileType, partial: Path) -> None:
    writer, config = gguf.GGUFWriter(partial, source.family.name), source.config
    tokenizer = source.tokenizer
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_name(source.folder.resolve().name, tokenizer))
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    config_bos = config.bos_token_id if isinstance(config.bos_token_id, int) else None
    factors = write_settings(writer, source.family, config)
    make_vocabulary(tokenizer, source.shapes[EMBEDDING][0], config_bos).write(writer)
    extra = [
        (Entry(name, tuple(tensor.shape), GGMLQuantizationType.F32), tensor)
        for name, tensor in factors.items()
    ]
    every = [*(entry for entry, _ in extra), *entries.values()]
    check_room(partial.parent, sum(num_bytes(entry.shape, entry.kind) for entry in every))

    def tensors() -> Iterator[tuple[Entry, Tensor]]:
        yield from extra
        for name, tensor in source.tensors():
            yield entries[name], source.family.convert(name, tensor, config)

    with torch.inference_mode():
        write_tensors(writer, every, tensors())


def count(kinds: Iterator[GGMLQuantizationType]) -> dict[str, int]:
    """Return how many tensors have each type."""
    counts: dict[str, int] = {}
    for kind in kinds:
        counts[kind.name] = counts.get(kind.name, 0) + 1
    return counts
