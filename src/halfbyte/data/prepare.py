"""From a configuration to tokenized, checked, counted rows: what `train` trains on."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import datasets
import numpy as np
import pyarrow.compute
from transformers import PreTrainedTokenizerBase

from halfbyte.data.checks import check
from halfbyte.data.config import DataConfig
from halfbyte.data.findings import refuse
from halfbyte.data.gather import InMemory, Split, gather
from halfbyte.data.length import apply_policy
from halfbyte.data.notes import Note
from halfbyte.data.rows import TokenRows
from halfbyte.data.sources import WHERE
from halfbyte.data.summary import COUNTED_NOTES, SplitSummary, Summary, length_percentiles
from halfbyte.errors import DataError


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
        DataError: the data cannot be read, rows are longer than `max_length` (with
            `over_length: error`), nothing would be learned, or a finding that ruins a model is not
            in `config.allow`.
    """
    started = time.perf_counter()
    gathered = gather(
        config, tokenizer, seed=seed, rows=rows, eval_rows=eval_rows, progress=progress
    )
    refuse_broken(gathered.splits, config)
    train_rows, train_summary = _finish(gathered.train, config)
    held_out = gathered.eval
    eval_rows_, eval_summary = _finish(held_out, config) if held_out else (None, None)
    findings = check(gathered, config)
    refuse(findings)
    summary = Summary(
        train=train_summary,
        eval=eval_summary,
        eval_overlap=_overlap(train_rows, eval_rows_),
        format=gathered.train.layout.format,
        stop=gathered.stop,
        seconds=time.perf_counter() - started,
        from_cache=gathered.train.from_cache,
        findings=tuple(findings),
    )
    return PreparedData(
        train=train_rows.to_dataset(),
        eval=None if eval_rows_ is None else eval_rows_.to_dataset(),
        fingerprint=_fingerprint(config, train_rows, eval_rows_),
        summary=summary,
        chat_template=gathered.template,
        stop_token_ids=_stop_ids(tokenizer, summary),
    )


def refuse_broken(splits: Mapping[str, Split], config: DataConfig) -> None:
    """Raise the first row's error where rows could not be read, unless that is allowed."""
    broken = [row for split in splits.values() for row in split.broken]
    if not broken or "unreadable_rows" in config.allow:
        return
    more = f" (and {len(broken) - 1:,} more rows cannot be used)" if len(broken) > 1 else ""
    leave_out = "allow: [unreadable_rows] leaves such rows out"
    hint = f"{broken[0].hint}; {leave_out}" if broken[0].hint else leave_out
    raise DataError(broken[0].message + more, hint=hint)


def _finish(data: Split, config: DataConfig) -> tuple[TokenRows, SplitSummary]:
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
        unreadable_rows=len(data.broken),
        unsupervised_rows=data.num_read - len(data.facts.errors) - num_left - lengths.dropped_rows,
        **asdict(lengths),
        **{str(note.name).lower(): _count(rows, note) for note in COUNTED_NOTES},
        percentiles=length_percentiles(rows.lengths),
        sources=_by_file(data, rows),
    )


def _by_file(data: Split, rows: TokenRows) -> dict[str, int]:
    """Return the learned tokens of each file, where rows come from several."""
    if WHERE not in data.source.rows.column_names:
        return {}
    where = data.source.rows.select_columns(WHERE).with_format("arrow")[:][WHERE]
    files = pyarrow.compute.replace_substring_regex(where, r"(^| )(line|row) \d+.*$", "")
    files = files.combine_chunks().dictionary_encode()
    names = files.dictionary.to_pylist()
    if len(names) < 2:
        return {}
    codes = files.indices.to_numpy()[rows.source]
    learned = np.bincount(codes, weights=rows.supervised, minlength=len(names))
    return {name: int(count) for name, count in zip(names, learned, strict=True)}


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
