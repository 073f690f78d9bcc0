"""An adapter is added to its base, tensor by tensor, into a plain transformers checkpoint.

Each tensor is read, updated in float32, rounded once to its dtype and written, so that memory holds
a few tensors and not the model. Tensors that nothing touches are copied as they are. The folder
appears whole or not at all.

Onto which base? Training saw the base through its 4 bits; `onto="dequantized"` adds the adapter to
just that. `onto="original"` adds it to the 16-bit weights, which the adapter never saw.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from halfbyte.adapters.files import AdapterFiles, read_adapter_files
from halfbyte.checkpoint.publish import publish
from halfbyte.checkpoint.writer import ShardedWriter
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.export.adapter import updates_by_tensor
from halfbyte.export.base import BaseWeights, Recipe
from halfbyte.export.companions import copy_companions, write_config
from halfbyte.export.plan import Plan, Step, make_plan
from halfbyte.export.record import check_base, find_base, recorded_recipe
from halfbyte.export.updates import EmbeddingUpdate, LoraUpdate
from halfbyte.models.skeleton import Skeleton, conv1d_weights, read_skeleton
from halfbyte.quant.config import NF4Config

Onto = Literal["dequantized", "original"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Merged:
    """One tensor of the merged model.

    Args:
        name: Its name in the checkpoint.
        tensor: Its value, rounded.
        rounding_loss: Norm of the rounding error / norm of the update; None where there was none.
    """

    name: str
    tensor: Tensor
    rounding_loss: float | None = None


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Args:
        path: The folder.
        base: Folder of the base.
        onto: Which base the adapter was added to.
        tensors: Tensors in the checkpoint.
        tensors_merged: Of these, how many the adapter changed.
        rounding_loss: Share of the update that rounding to the checkpoint's dtype lost, as a norm,
            mean over the merged weights: 0 lost nothing, 1 as much as the update itself.
        rounding_loss_by_tensor: The same for each merged weight.
    """

    path: Path
    base: Path
    onto: Onto
    tensors: int
    tensors_merged: int
    rounding_loss: float
    rounding_loss_by_tensor: dict[str, float] = field(repr=False)


def merged_tensors(
    plan: Plan, base: BaseWeights, adapter: AdapterFiles, dtype: torch.dtype | None
) -> Iterator[Merged]:
    """Yield the merged model's tensors, one at a time, in the order of the plan.

    Args:
        plan: What to do.
        base: The base's dense tensors.
        adapter: Where the updates are read from.
        dtype: dtype of all floating-point tensors; None keeps each one's own.

    Raises:
        AdapterError: an update does not fit its tensor, or holds NaN or Inf.
    """
    for step in plan.steps:
        tensor = base.tensor(step.source)
        # Training may have cast the weight before it quantized it, to float32 on most CPUs.
        target = base.stored_dtype(step.source) or tensor.dtype
        if dtype is not None and tensor.is_floating_point():
            target = dtype
        yield (
            _merge(step, tensor, adapter, target)
            if step.updates
            else Merged(step.name, tensor.to(target))
        )


def _merge(step: Step, tensor: Tensor, adapter: AdapterFiles, dtype: torch.dtype) -> Merged:
    def load(key: str) -> Tensor:
        return adapter.tensors[key].float()

    before = updated = tensor.float()
    for update in step.updates:
        updated = update.apply(updated, load)
    written = updated.to(dtype)
    if not torch.isfinite(written).all():
        raise AdapterError(
            f"{step.name} overflows {str(dtype).removeprefix('torch.')} after merging",
            hint="merge into bfloat16 or float32 with dtype=...",
        )
    loss = None
    if any(isinstance(update, LoraUpdate | EmbeddingUpdate) for update in step.updates):
        change = torch.linalg.vector_norm(updated - before)
        lost = torch.linalg.vector_norm(written.float() - updated)
        loss = float(lost / change) if change > 0 else 0.0
    return Merged(step.name, written.contiguous(), loss)


def merge(
    adapter: str | Path,
    to: str | Path,
    *,
    onto: Onto = "dequantized",
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    quant: NF4Config | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> MergeResult:
    """Write adapter and base as one plain transformers checkpoint, with its tokenizer.

    Args:
        adapter: A run's folder, or any folder with an adapter in peft's format.
        to: The folder to make.
        onto: "dequantized", the base as training saw it through its 4 bits; or "original", the
            16-bit base.
        base: The base's folder or hub name, where it is not where training found it.
        dtype: dtype of the merged weights; by default that of the base's.
        quant: How training held the base in 4 bits, where the adapter's folder does not say.
        max_shard_size: Largest file of weights, such as "5GB" or "500MB".
        overwrite: Replace `to` if it is there.

    Raises:
        AdapterError: the adapter is damaged, does not fit its base, or cannot be merged rightly.
        CheckpointError: the base cannot be found or read, or `to` is there already.
        ConfigError: a setting has no such value.
    """
    if onto not in ("dequantized", "original"):
        raise ConfigError(f"onto should be 'dequantized' or 'original', got {onto!r}")
    target, max_shard_bytes = _dtype(dtype), parse_size(max_shard_size)
    files = read_adapter_files(adapter)
    folder = find_base(files, base)
    skeleton = read_skeleton(folder)
    check_base(files, skeleton)
    recipe = _recipe(files, onto, quant, is_packed=bool(skeleton.packed))
    weights = BaseWeights(skeleton, recipe)
    updates = updates_by_tensor(files, conv1d_weights(skeleton.model))
    plan = make_plan(weights.names, skeleton, updates, files.config)
    with publish(Path(to), overwrite=overwrite) as partial:
        tensors = _with_progress(merged_tensors(plan, weights, files, target), len(plan.steps))
        facts = _write(tensors, partial, max_shard_bytes)
        losses = {name: fact.loss for name, fact in facts.items() if fact.loss is not None}
        written = target or next(f.dtype for f in facts.values() if f.dtype.is_floating_point)
        changes = _changed_settings(skeleton, plan, facts)
        write_config(folder, partial, written, changes)
        copy_companions(files.folder, folder, partial)
    return MergeResult(
        path=Path(to),
        base=folder,
        onto=onto,
        tensors=len(plan.steps),
        tensors_merged=sum(bool(step.updates) for step in plan.steps),
        rounding_loss=math.fsum(losses.values()) / max(len(losses), 1),
        rounding_loss_by_tensor=losses,
    )


def _recipe(
    adapter: AdapterFiles, onto: Onto, quant: NF4Config | None, *, is_packed: bool
) -> Recipe | None:
    """Return how the base is taken through 4 bits; None where its tensors are right as they are."""
    if onto == "original" and is_packed:
        raise AdapterError(
            "onto=original needs the 16-bit base, and the base is a 4-bit checkpoint",
            hint="say where the 16-bit one is with base=..., or use onto=dequantized",
        )
    if onto == "original" or is_packed:
        return None
    return Recipe(quant) if quant is not None else recorded_recipe(adapter)


class _Fact(NamedTuple):
    """What is remembered of a tensor once it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    loss: float | None


def _with_progress(tensors: Iterator[Merged], total: int) -> Iterator[Merged]:
    """Show on stderr, in a terminal, how far the merge is."""
    console = Console(stderr=True)
    yield from track(
        tensors, "merging", total, console=console, transient=True, disable=not console.is_terminal
    )


def _write(tensors: Iterator[Merged], folder: Path, max_shard_bytes: int) -> dict[str, _Fact]:
    """Write all tensors; return what is to be remembered of each."""
    facts = {}
    with ShardedWriter(folder, max_shard_bytes) as writer:
        for merged in tensors:
            writer.add(merged.name, merged.tensor)
            shape = tuple(merged.tensor.shape)
            facts[merged.name] = _Fact(shape, merged.tensor.dtype, merged.rounding_loss)
    return facts


def _changed_settings(skeleton: Skeleton, plan: Plan, facts: Mapping[str, _Fact]) -> dict[str, Any]:
    """Return the settings of the base that the merged model has otherwise.

    Raises:
        AdapterError: the embedding grew and the output head did not, or the reverse.
    """
    changes: dict[str, Any] = {"tie_word_embeddings": False} if plan.unties else {}
    model, on_disk = skeleton.model, {there: name for name, there in skeleton.names.items()}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    in_memory = [f"{name}.weight" for name, part in model.named_modules() if part in tables]
    names = [on_disk.get(name, name) for name in in_memory]
    rows = {facts[name].shape[0] for name in names if name in facts}
    if len(rows) > 1:
        raise AdapterError(
            f"embedding and output head would have {sorted(rows)} rows after merging",
            hint="train both: modules_to_save should name embedding and output head",
        )
    if rows and rows != {skeleton.config.get_text_config().vocab_size}:
        changes["vocab_size"] = rows.pop()
    return changes


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise ConfigError(f"dtype should be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return found


def parse_size(text: str) -> int:
    """Return the bytes in "500MB" or "2GiB".

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ConfigError(f"expected a size such as 5GB or 500MB, got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].upper()])
