"""What is exported: a model's dense tensors one at a time, with its settings and tokenizer.

A run's folder (or an adapter's) gives its base with the adapter merged on the way, in float32 and
not rounded before the file's own type; a model's folder gives its tensors, dequantized where they
are in 4 bits.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from halfbyte.adapters.files import CONFIG_FILE
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.export.base import BaseWeights
from halfbyte.export.choice import Choice, choose
from halfbyte.export.config import Form, MergeConfig
from halfbyte.export.plan import Plan, Step
from halfbyte.export.source import Source as MergeSource
from halfbyte.export.updates import ReplaceUpdate
from halfbyte.gguf.families import Family, find_family
from halfbyte.models.folder import find_folder
from halfbyte.models.skeleton import Skeleton, read_skeleton
from halfbyte.models.tokenizer import load_tokenizer

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_LANGUAGE_MODEL = "model.language_model."
_TEXT_PARTS = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
_Tensors = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Source:
    """A model to be written.

    Args:
        folder: Where it was read: a model's folder, or an adapter's.
        config: Settings of the text model.
        family: Its family.
        tokenizer: With the chat template that was trained with.
        shapes: Name in transformers and shape of every tensor, in order.
        is_tied: Embedding and output are one matrix.
        choice: What an adapter is added to, and why; None for a model's folder.
    """

    folder: Path
    config: PreTrainedConfig
    family: Family
    tokenizer: PreTrainedTokenizerBase
    shapes: dict[str, tuple[int, ...]]
    is_tied: bool
    choice: Choice | None
    _names: dict[str, str]
    _read: _Tensors

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, float32 tensor) in the order of `shapes`."""
        for name, tensor in self._read():
            there = self._names.get(name)
            if there in self.shapes:
                yield there, tensor.float().cpu()


def open_source(
    folder: str | Path, config: MergeConfig | None = None, *, base_only: bool = False
) -> Source:
    """Find what is to be written, without reading weights.

    Args:
        folder: A run's folder, an adapter's, a model's, or a model's name on the hub.
        config: How to merge, where there is an adapter.
        base_only: Leave the adapter out: its base alone, as training saw it.

    Raises:
        HalfbyteError: something is missing, damaged, or cannot be exported.
    """
    path = Path(folder)
    if (path / CONFIG_FILE).is_file():
        settings = dataclasses.replace(config or MergeConfig(), dtype="float32")
        return _open_base(path, settings) if base_only else _open_adapter(path, settings)
    base = find_folder(folder)
    skeleton = read_skeleton(base)
    weights = BaseWeights(skeleton)

    def read() -> Iterator[tuple[str, Tensor]]:
        return ((name, weights.tensor(name)) for name in weights.names)

    plan = Plan(tuple(Step(name, name) for name in weights.names))
    return _source(base, skeleton, plan, read)


def _open_adapter(path: Path, config: MergeConfig) -> Source:
    """Open an adapter with its base; which one is right is measured, if asked for."""
    if config.onto == "quantized":
        raise ConfigError(
            "onto should be dequantized, original or auto for a GGUF file, got 'quantized'",
            hint="choose its bits with the file's type: q4_k_m has 4",
        )
    merging = MergeSource.find(path, config)
    find_family(merging.skeleton.config.get_text_config())  # before anything is measured
    choice = choose(merging)
    merger = merging.merger(choice.onto)

    def read() -> Iterator[tuple[str, Tensor]]:
        return ((merged.name, merged.dense()) for merged in merger.tensors())

    source = _source(merging.folder, merging.skeleton, merger.plan, read, path)
    shapes = dict(source.shapes)
    for step in merger.plan.steps:
        for update in step.updates:
            name = source._names.get(step.name)
            if isinstance(update, ReplaceUpdate) and name in shapes:  # it may have more rows
                shapes[name] = tuple(merging.adapter.tensors[update.copy].shape)
    return dataclasses.replace(source, shapes=shapes, choice=choice)


def _open_base(path: Path, config: MergeConfig) -> Source:
    """Open an adapter's base as training saw it, with the tokenizer that it was trained with."""
    merging = MergeSource.find(path, config)
    plan = Plan(tuple(Step(name, name) for name in BaseWeights(merging.skeleton).names))
    form: Form = "original" if config.onto == "original" else "dequantized"
    merger = dataclasses.replace(merging.merger(form), plan=plan)

    def read() -> Iterator[tuple[str, Tensor]]:
        return ((merged.name, merged.dense()) for merged in merger.tensors())

    return _source(merging.folder, merging.skeleton, plan, read, path)


def _source(
    base: Path, skeleton: Skeleton, plan: Plan, read: _Tensors, adapter: Path | None = None
) -> Source:
    config = skeleton.config.get_text_config()
    family = find_family(config)
    if skeleton.converted:
        raise CheckpointError(
            f"{base} is a mixture of experts, which cannot be written as GGUF here",
            hint="merge it, and use llama.cpp's own convert_hf_to_gguf.py on the folder",
        )
    is_tied = bool(config.tie_word_embeddings) and not plan.unties
    names = {}
    for step in plan.steps:
        name = _text_name(skeleton.names.get(step.name, step.name))
        if name is not None and not (is_tied and name == OUTPUT):
            names[step.name] = name
    state = skeleton.model.state_dict()
    shapes = {
        names[step.name]: tuple(state[skeleton.names[step.source]].shape)
        for step in plan.steps
        if step.name in names
    }
    has_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    chosen = adapter if adapter is not None and has_tokenizer else base
    rows = skeleton.model.get_input_embeddings().num_embeddings
    return Source(
        folder=base if adapter is None else adapter,
        config=config,
        family=family,
        tokenizer=load_tokenizer(chosen, rows),
        shapes=shapes,
        is_tied=is_tied,
        choice=None,
        _names=names,
        _read=read,
    )


def _text_name(name: str) -> str | None:
    """Return a tensor's name in a text model; None for those of a vision part."""
    if name.startswith(_LANGUAGE_MODEL):
        return "model." + name.removeprefix(_LANGUAGE_MODEL)
    return name if name.startswith(_TEXT_PARTS) else None
