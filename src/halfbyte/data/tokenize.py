"""Source rows to rows of tokens and what is remarkable about them, on all cores, kept.

One pass finds every row that cannot be read or masked; the row is then without tokens, and says
why. What the audit needs to know of a row's text is noted in the same pass.

The cache's key is made of everything that the tokens depend on: the content of the rows, the
tokenizer, the template, the layout and what is learned. Length limits, packing and the seed come
later and need no new tokens.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerBase

from halfbyte.data.chat import ChatEncoder, Encoded
from halfbyte.data.content import content_notes, text_of
from halfbyte.data.facts import Facts, origin_of
from halfbyte.data.formats import Example, Layout
from halfbyte.data.notes import Note
from halfbyte.data.rows import TokenRows
from halfbyte.data.similar import DRAWERS, signatures
from halfbyte.data.sources import Source, decode
from halfbyte.data.words import WordsDifferError
from halfbyte.errors import DataError

_log = logging.getLogger(__name__)

# Raise it whenever the same input gives other tokens or labels than before.
CACHE_VERSION = 2
ROWS_PER_PROCESS = 2_500
BATCH_ROWS = 500
_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "source": datasets.Value("int64"),
        "notes": datasets.Value("int64"),
        "error": datasets.Value("string"),
        "hint": datasets.Value("string"),
        "origin": datasets.Value("string"),
        "signature": datasets.List(datasets.Value("uint32"), length=DRAWERS),
    }
)

_NO_TOKENS = Encoded([], [])


def tokenize(
    source: Source,
    layout: Layout,
    encoder: ChatEncoder,
    *,
    num_proc: int | None = None,
    cache_dir: str | None = None,
    progress: bool | None = None,
) -> tuple[TokenRows, Facts, bool]:
    """Return the rows of tokens of a source, facts of each of its rows, and if they were cached.

    Args:
        source: Rows.
        layout: How they are read.
        encoder: How they become tokens.
        num_proc: Processes; by default the cores, or one where the rows are few.
        cache_dir: Where tokens are kept; by default beside the `datasets` cache.
        progress: Show a bar; by default where stderr is a terminal.

    Raises:
        DataError: the cache cannot be used, or a process died.
    """
    key = cache_key(source, layout, encoder)
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "halfbyte") / key
    hint = "set cache_dir to a folder that can be written to, or delete it to begin afresh"

    def run() -> datasets.Dataset:
        return source.rows.map(
            tokenize_batch,
            batched=True,
            batch_size=BATCH_ROWS,
            with_indices=True,
            fn_kwargs={"encoder": encoder, "layout": layout},
            remove_columns=source.rows.column_names,
            features=_FEATURES,
            num_proc=num_proc or _processes(len(source)),
            cache_file_name=str(folder / "tokens.arrow"),
            new_fingerprint=key,
            desc=f"Tokenizing {source.title}",
        )

    try:
        was_there = any(folder.glob("tokens*.arrow"))
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bars(shown=sys.stderr.isatty() if progress is None else progress):
            try:
                tokens = run()
            except WordsDifferError:
                _log.warning("this tokenizer does not go word by word: all rows again, slower")
                encoder.words.by_whole_texts()
                tokens = run()
        return TokenRows.from_dataset(tokens), Facts.from_dataset(tokens), was_there
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"the token cache {folder} cannot be used: {error}", hint=hint) from error
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise DataError(
            f"a process that tokenized {source.title} was killed, perhaps for its memory",
            hint="set num_proc: 1, or a smaller number than there are cores",
        ) from error


def tokenize_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    encoder: ChatEncoder,
    layout: Layout,
) -> pyarrow.Table:
    """Return the rows of tokens of one batch of source rows.

    A source row without tokens (it is broken, or teaches nothing) is one row of no tokens.
    """
    with _collector_paused():
        return _table(_columns(batch, indices, encoder, layout))


def _columns(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    encoder: ChatEncoder,
    layout: Layout,
) -> dict[str, list[Any]]:
    rows = list(decode(batch, indices))
    examples = [_attempt(layout, row, where) for where, row in rows]
    readable = [
        (where, example)
        for (where, _), example in zip(rows, examples, strict=True)
        if isinstance(example, Example)
    ]
    encoded = iter(encoder.encode_each(readable))
    texts = [text_of(example) if isinstance(example, Example) else "" for example in examples]
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for index, (_, row), example, signature in zip(
        indices, rows, examples, signatures(texts), strict=True
    ):
        notes = Note.NONE
        result: Example | list[Encoded] | DataError = example
        if isinstance(example, Example):
            notes, result = content_notes(example, encoder.known), next(encoded)
        error = result if isinstance(result, DataError) else None
        for tokens in (result if isinstance(result, list) else []) or [_NO_TOKENS]:
            columns["input_ids"].append(tokens.input_ids)
            columns["labels"].append(tokens.labels)
            columns["source"].append(index)
            columns["notes"].append(int(tokens.notes | notes))
            columns["error"].append(error and error.message)
            columns["hint"].append(error and error.hint)
            columns["origin"].append(origin_of(row))
            columns["signature"].append(signature)
    return columns


def _table(columns: Mapping[str, list[Any]]) -> pyarrow.Table:
    """Return the columns of `_FEATURES`; numbers go there through NumPy, not one by one."""
    arrays: dict[str, Any] = dict(columns)
    for name in ("input_ids", "labels"):
        offsets = np.cumsum([0, *map(len, columns[name])], dtype=np.int32)
        flat = itertools.chain.from_iterable(columns[name])
        values = np.fromiter(flat, dtype=np.int32, count=offsets[-1])
        arrays[name] = pyarrow.ListArray.from_arrays(offsets, values)
    drawers = np.concatenate(columns["signature"])
    arrays["signature"] = pyarrow.FixedSizeListArray.from_arrays(drawers, DRAWERS)
    return pyarrow.table(arrays, schema=_FEATURES.arrow_schema)


def _attempt(layout: Layout, row: Mapping[str, Any], where: str) -> Example | DataError:
    try:
        return layout.read(row, where)
    except DataError as error:
        return error


def cache_key(source: Source, layout: Layout, encoder: ChatEncoder) -> str:
    """Return 32 hexadecimal digits that change whenever the tokens might."""
    content = {
        "version": CACHE_VERSION,
        "source": source.fingerprint,
        "layout": asdict(layout),
        "tokenizer": tokenizer_key(encoder.tokenizer),
        "template": encoder.renderer.template or encoder.tokenizer.chat_template,
        "loss_on": encoder.renderer.loss_on,
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what a tokenizer does to text."""
    special = {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if name != "pad_token"  # no row has padding
    }
    parts = [tokenizer.backend_tokenizer.to_str(), special]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the search for cycles: a batch has none, and a sixth of the time went there."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _processes(num_rows: int) -> int | None:
    """Return how many processes pay for their start: `None` is this one alone."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    count = min(cores, num_rows // ROWS_PER_PROCESS)
    return count if count > 1 else None


@contextlib.contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """Show or hide the bars of `datasets` for a while."""
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
