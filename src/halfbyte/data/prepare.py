"""From a configuration to tokenized, checked, counted rows: what `train` trains on."""

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from halfbyte.data.chat import ChatEncoder, Note
from halfbyte.data.config import DataConfig
from halfbyte.data.formats import Layout, detect
from halfbyte.data.length import apply_policy
from halfbyte.data.packing import shuffled
from halfbyte.data.rows import TokenRows
from halfbyte.data.sources import Source, from_rows, load_source
from halfbyte.data.summary import SplitSummary, Summary, length_percentiles
from halfbyte.data.templates import resolve_template
from halfbyte.data.tokenize import progress_bars, tokenize
from halfbyte.errors import DataError

InMemory: TypeAlias = Sequence[Mapping[str, Any]] | datasets.Dataset


@dataclass(frozen=True)
class PreparedData:
    """Rows of tokens with labels.

    Args:
        train: Columns `input_ids` and `labels` (-100 where nothing is learned; not shifted).
        eval: The same for held-out rows, if there are any.
        fingerprint: SHA-256 of the tokens, the labels and the settings that order them: equal
            for two runs that see the same batches.
        summary: What became of the rows.
        chat_template: The Jinja text that was used, where it is not the tokenizer's own. The
            tokenizer must be saved with it, or the model is served with another.
        stop_token_ids: What ends the assistant's turn; generation has to stop there.
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    fingerprint: str
    summary: Summary
    chat_template: str | None
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Tokenized:
    rows: TokenRows
    num_read: int
    title: str
    from_cache: bool

    def part(self, chosen: Any, num_read: int, title: str) -> "_Tokenized":
        return _Tokenized(self.rows.select(chosen), num_read, title, self.from_cache)


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    rows: InMemory | None = None,
    eval_rows: InMemory | None = None,
    progress: bool | None = None,
) -> PreparedData:
    """Read, format, tokenize, mask and check the data.

    Args:
        config: What to read, and how.
        tokenizer: The model's.
        seed: Chooses the rows that `eval_fraction` holds out.
        rows: Rows in memory, instead of `config.path`.
        eval_rows: Held-out rows in memory, instead of `config.eval_path`.
        progress: Show bars; by default where stderr is a terminal.

    Raises:
        DataError: the data cannot be read, a row does not fit, rows are longer than `max_length`
            (with `over_length: error`), or nothing would be learned.
    """
    started = time.perf_counter()
    with progress_bars(shown=sys.stderr.isatty() if progress is None else progress):
        source = _source(config, rows, eval_source=False)
        held_out = _source(config, eval_rows, eval_source=True)
    if source is None:
        raise DataError("no data: `path` is not set", hint="set `path` to a file or a hub name")
    layout = detect(config.format, config.columns, source.first(), config.system_prompt)
    template = (
        None if layout.format == "text" else resolve_template(config.chat_template, tokenizer)
    )
    encoder = ChatEncoder(tokenizer, template, loss_on=config.loss_on)
    train = _tokenize(source, layout, encoder, config, progress)
    evaluation = None
    if held_out is not None:
        other = detect(config.format, config.columns, held_out.first(), config.system_prompt)
        evaluation = _tokenize(held_out, other, encoder, config, progress)
    elif config.eval_fraction:
        train, evaluation = hold_out(train, config.eval_fraction, seed)
    train_rows, train_summary = _finish(train, config)
    eval_rows_, eval_summary = _finish(evaluation, config) if evaluation else (None, None)
    is_text = layout.format == "text"
    summary = Summary(
        train=train_summary,
        eval=eval_summary,
        eval_overlap=_overlap(train_rows, eval_rows_),
        format=layout.format,
        stop=tokenizer.eos_token if is_text else encoder.renderer.stop,
        seconds=time.perf_counter() - started,
        from_cache=train.from_cache,
    )
    return PreparedData(
        train=train_rows.to_dataset(),
        eval=None if eval_rows_ is None else eval_rows_.to_dataset(),
        fingerprint=_fingerprint(config, train_rows, eval_rows_),
        summary=summary,
        chat_template=template,
        stop_token_ids=_stop_ids(tokenizer, summary),
    )


def _source(config: DataConfig, rows: InMemory | None, *, eval_source: bool) -> Source | None:
    if rows is not None:
        return from_rows(rows)
    path, split = config.path, config.split
    if eval_source:
        if config.eval_path is None and config.eval_split is None:
            return None
        path, split = config.eval_path or config.path, config.eval_split
    if path is None:
        return None
    name = config.name if path == config.path else None
    return load_source(path, name=name, split=split, cache_dir=config.cache_dir)


def _tokenize(
    source: Source,
    layout: Layout,
    encoder: ChatEncoder,
    config: DataConfig,
    progress: bool | None,  # noqa: FBT001
) -> _Tokenized:
    rows, from_cache = tokenize(
        source,
        layout,
        encoder,
        num_proc=config.num_proc,
        cache_dir=config.cache_dir,
        progress=progress,
    )
    return _Tokenized(rows, len(source), source.title, from_cache)


def hold_out(data: _Tokenized, fraction: float, seed: int) -> tuple[_Tokenized, _Tokenized]:
    """Split rows in two by the seed, keeping equal rows (and one conversation's) on one side.

    Raises:
        DataError: there are too few different rows.
    """
    sources, first = np.unique(data.rows.source, return_index=True)
    keys = data.rows.select(first).keys()
    groups = np.unique(np.array(keys, dtype=object), return_inverse=True)[1]
    sizes = np.bincount(groups)
    order = shuffled(len(sizes), seed=seed, epoch=0, stream=2)
    wanted = max(1, round(fraction * data.num_read))
    count = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    if count >= len(sizes):
        raise DataError(
            f"eval_fraction={fraction} of {data.title} would leave nothing to train on: "
            f"it has {len(sizes)} different rows",
            hint="give held-out rows of their own with eval_path, or a smaller eval_fraction",
        )
    is_held = np.isin(groups, order[:count])
    held = np.isin(data.rows.source, sources[is_held])
    num_held = int(is_held.sum())
    return (
        data.part(~held, data.num_read - num_held, data.title),
        data.part(held, num_held, f"the held-out part of {data.title}"),
    )


def _finish(data: _Tokenized, config: DataConfig) -> tuple[TokenRows, SplitSummary]:
    """Drop what teaches nothing, apply the length policy, and count."""
    learned = data.rows.select(data.rows.supervised > 0)
    rows, lengths = apply_policy(learned, config.over_length, config.max_length, title=data.title)
    rows = rows.select(rows.supervised > 0)
    supervised = int(rows.supervised.sum())
    if not supervised:
        raise DataError(
            f"0 trainable tokens: none of the {data.num_read:,} rows of {data.title} has anything "
            "to learn" + (f" within max_length={config.max_length}" if len(learned) else ""),
            hint="raise max_length" if len(learned) else "are there assistant turns in the data?",
        )
    num_left = len(np.unique(rows.source))
    return rows, SplitSummary(
        rows_read=data.num_read,
        rows=len(rows),
        total_tokens=int(rows.offsets[-1]),
        supervised_tokens=supervised,
        unsupervised_rows=data.num_read - num_left - lengths.dropped_rows,
        **asdict(lengths),
        **{str(note.name).lower(): _count(rows, note) for note in Note},
        percentiles=length_percentiles(rows.lengths),
    )


def _count(rows: TokenRows, note: Note) -> int:
    return int(np.count_nonzero(rows.notes & int(note)))


def _overlap(train: TokenRows, evaluation: TokenRows | None) -> int:
    if evaluation is None:
        return 0
    seen = set(train.keys())
    return sum(key in seen for key in evaluation.keys())  # noqa: SIM118


def _stop_ids(tokenizer: PreTrainedTokenizerBase, summary: Summary) -> tuple[int, ...]:
    stops = [summary.stop] if summary.stop else []
    if tokenizer.eos_token and tokenizer.eos_token not in stops:
        stops.append(tokenizer.eos_token)
    vocabulary = tokenizer.get_vocab()
    return tuple(vocabulary[stop] for stop in stops)


def _fingerprint(config: DataConfig, train: TokenRows, evaluation: TokenRows | None) -> str:
    content = {
        "train": train.digest(),
        "eval": evaluation.digest() if evaluation else None,
        "max_length": config.max_length,
        "packing": config.packing,
        "shuffle": config.shuffle,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
