"""An adapter is added to its base, tensor by tensor, into a transformers checkpoint.

Each tensor is read, updated in float32, rounded once and written, so that memory holds a few
tensors and not the model. Tensors that nothing touches are copied as they are. The folder appears
whole or not at all, and a merge that was interrupted goes on where it was.

Onto which base? Training saw the base through its 4 bits; "dequantized" adds the adapter to just
that, "original" to the 16-bit weights, which the adapter never saw. Which of the two is nearer to
what was trained is measured where there are rows to measure on (`halfbyte.export.choice`).
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import halfbyte
from halfbyte.adapters.files import CONFIG_FILE, IDENTITY_FILE, WEIGHTS_FILE
from halfbyte.checkpoint.publish import check_free, publish_resumably, sha256
from halfbyte.checkpoint.writer import ShardedWriter
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.export.choice import Choice, choose
from halfbyte.export.companions import copy_companions, write_config
from halfbyte.export.config import DTYPES, Form, MergeConfig
from halfbyte.export.source import Source
from halfbyte.export.tensors import Merged, Rounding
from halfbyte.train.card import write_card

REPORT_FILE = "merge_report.json"


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        path: The folder.
        base: Folder of the base.
        onto: What the adapter was added to, and in which form the sum was written.
        choice: Why, and what was measured.
        tensors: Tensors in the model.
        tensors_merged: Of these, how many the adapter changed.
        rounding: What rounding did to the update, by merged weight.
    """

    path: Path
    base: Path
    onto: Form
    choice: Choice
    tensors: int
    tensors_merged: int
    rounding: dict[str, Rounding] = field(repr=False)

    @property
    def rounding_loss(self) -> float:
        """|rounding error| / |update|, mean over the merged weights: 0 lost nothing."""
        return _mean([each.lost for each in self.rounding.values()])

    @property
    def update_kept(self) -> float:
        """How much of the update is there, along itself, mean over the merged weights."""
        return _mean([each.kept for each in self.rounding.values()])

    def words(self) -> list[str]:
        """Return what was chosen, why, and what rounding did, a sentence each."""
        said = self.choice.words()
        if self.rounding:
            said.append(
                f"Rounding moved the merged weights by {self.rounding_loss:.1%} of the update's "
                f"length, and {self.update_kept:.1%} of the update is there."
            )
        if self.onto == "quantized":
            said.append(
                "Warning: in 4 bits this is not the model that was trained. The 4-bit base with "
                "the adapter beside it is that model, and hardly larger."
            )
        return said

    def report(self) -> dict[str, Any]:
        """Return what merge_report.json says."""
        return {
            "version": 1,
            "base": str(self.base),
            "onto": self.onto,
            "reason": self.choice.reason,
            "in_words": self.words(),
            "measured": self.choice.measured and dataclasses.asdict(self.choice.measured),
            "tensors": self.tensors,
            "tensors_merged": self.tensors_merged,
            "rounding": {
                "lost": self.rounding_loss,
                "kept": self.update_kept,
                "by_tensor": {n: dataclasses.asdict(r) for n, r in self.rounding.items()},
            },
        }


def merge(
    adapter: str | Path, to: str | Path, config: MergeConfig | None = None, **settings: Any
) -> MergeResult:
    """Write adapter and base as one transformers checkpoint, with its tokenizer.

    Beside the weights stands merge_report.json: what was chosen, why, and what was measured.

    Args:
        adapter: A run's folder, or any folder with an adapter in peft's format.
        to: The folder to make.
        config: How; see `MergeConfig`.
        **settings: The config's fields, instead of `config`.

    Raises:
        AdapterError: the adapter is damaged, does not fit its base, or cannot be merged rightly.
        CheckpointError: the base cannot be found or read, or `to` is there already.
        ConfigError: a setting is unknown or has no such value.
        DataError: the rows to measure on cannot be read.
    """
    config = _resolve(config, settings)
    check_free(Path(to), overwrite=config.overwrite)
    source = Source.find(adapter, config)
    choice = choose(source)
    merger = source.merger(choice.onto)
    purpose = _purpose(source, choice.onto)
    with publish_resumably(Path(to), purpose, overwrite=config.overwrite) as (partial, journal):
        with ShardedWriter(partial, config.max_shard_bytes, journal) as writer:
            tensors = merger.tensors(skip=set(writer.notes))
            left = len(merger.plan.steps) - len(writer.notes)
            for merged in _with_progress(tensors, left):
                _write(writer, merged)
        facts = writer.notes
        _write_config(source, choice.onto, partial, facts)
        copy_companions(source.adapter.folder, source.folder, partial)
        steps = merger.plan.steps
        lost = {step.name: facts[step.name]["rounding"] for step in steps}
        result = MergeResult(
            path=Path(to),
            base=source.folder,
            onto=choice.onto,
            choice=choice,
            tensors=len(steps),
            tensors_merged=sum(bool(step.updates) for step in steps),
            rounding={name: Rounding(**found) for name, found in lost.items() if found},
        )
        text = json.dumps(result.report(), indent=2, ensure_ascii=False) + "\n"
        (partial / REPORT_FILE).write_text(text, encoding="utf-8")
        write_card(source.adapter.folder, partial, merged=result.words(), name=Path(to).name)
    return result


def _resolve(config: MergeConfig | None, settings: dict[str, Any]) -> MergeConfig:
    names = [each.name for each in dataclasses.fields(MergeConfig)]
    unknown = sorted(settings.keys() - set(names))
    if unknown or (config is not None and settings):
        raise ConfigError(
            f"merge has no setting {unknown[0]!r}"
            if unknown
            else "merge got a config and settings",
            hint=f"its settings are {', '.join(names)}" if unknown else "give one of the two",
        )
    return config or MergeConfig(**settings)


def _purpose(source: Source, form: Form) -> dict[str, Any]:
    """Return what the bytes to be written depend on; an interrupted merge goes on if it is equal.

    The base may have hundreds of gigabytes, so it is told by sizes and times, not by its bytes.
    """
    recipe, config = source.recipe if form != "original" else None, source.config
    names = (CONFIG_FILE, WEIGHTS_FILE, IDENTITY_FILE)
    adapter = [source.adapter.folder / name for name in names]
    device = source.device
    return {
        "merge": form,
        "base": {
            str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns]
            for file in (source.folder / "config.json", *source.skeleton.reader.files)
        },
        "adapter": {file.name: sha256(file) for file in adapter if file.is_file()},
        "recipe": recipe and [recipe.config.to_dict(), recipe.config.block_size, str(recipe.dtype)],
        "dtype": str(config.torch_dtype),
        "max_shard_bytes": config.max_shard_bytes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": [halfbyte.__version__, str(torch.__version__)],
    }


def _write(writer: ShardedWriter, merged: Merged) -> None:
    """Write a tensor, or the parts of a 4-bit one; what is to be known stands with the last."""
    fact = {
        "shape": list(merged.value.shape),
        "dtype": str(merged.value.dtype).removeprefix("torch."),
        "rounding": merged.rounding and dataclasses.asdict(merged.rounding),
    }
    *others, (last, tensor) = merged.tensors().items()
    for name, part in others:
        writer.add(name, part)
    writer.add(last, tensor, notes={merged.name: fact})


def _with_progress(tensors: Iterator[Merged], total: int) -> Iterator[Merged]:
    """Show on stderr, in a terminal, how far the merge is."""
    console = Console(stderr=True)
    yield from track(
        tensors, "merging", total, console=console, transient=True, disable=not console.is_terminal
    )


def _write_config(source: Source, form: Form, to: Path, facts: Mapping[str, Any]) -> None:
    """Write config.json, with what the merge changed."""
    quant = source.quant(form)
    dtypes = [fact["dtype"] for fact in facts.values() if fact["dtype"] in DTYPES]
    dtype = source.config.torch_dtype or DTYPES[dtypes[0]]
    write_config(source.folder, to, dtype, _changed_settings(source, facts), quant)


def _changed_settings(source: Source, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the base that the merged model has otherwise.

    Raises:
        AdapterError: the embedding grew and the output head did not, or the reverse.
    """
    skeleton = source.skeleton
    changes: dict[str, Any] = {"tie_word_embeddings": False} if source.plan.unties else {}
    model, on_disk = skeleton.model, {there: name for name, there in skeleton.names.items()}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    in_memory = [f"{name}.weight" for name, part in model.named_modules() if part in tables]
    names = [on_disk.get(name, name) for name in in_memory]
    rows = {facts[name]["shape"][0] for name in names if name in facts}
    if len(rows) > 1:
        raise AdapterError(
            f"embedding and output head would have {sorted(rows)} rows after merging",
            hint="train both: modules_to_save should name embedding and output head",
        )
    if rows and rows != {skeleton.config.get_text_config().vocab_size}:
        changes["vocab_size"] = rows.pop()
    return changes


def _mean(values: list[float]) -> float:
    return math.fsum(values) / max(len(values), 1)
