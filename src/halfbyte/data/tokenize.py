"""Source rows to rows of tokens, on all cores, kept for the next time.

The cache's key is made of everything that the tokens depend on: the content of the rows, the
tokenizer, the template, the layout and what is learned. Length limits, packing and the seed come
later and need no new tokens.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from transformers import PreTrainedTokenizerBase

from halfbyte.data.chat import ChatEncoder
from halfbyte.data.formats import Layout
from halfbyte.data.rows import TokenRows
from halfbyte.data.sources import Source, decode
from halfbyte.errors import DataError

# Raise it whenever the same input gives other tokens or labels than before.
CACHE_VERSION = 1
ROWS_PER_PROCESS = 2_500
BATCH_ROWS = 500
_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "source": datasets.Value("int64"),
        "notes": datasets.Value("int64"),
    }
)


def tokenize(
    source: Source,
    layout: Layout,
    encoder: ChatEncoder,
    *,
    num_proc: int | None = None,
    cache_dir: str | None = None,
    progress: bool | None = None,
) -> tuple[TokenRows, bool]:
    """Return the rows of tokens of a source, and whether they came from the cache.

    Args:
        source: Rows.
        layout: How they are read.
        encoder: How they become tokens.
        num_proc: Processes; by default the cores, or one where the rows are few.
        cache_dir: Where tokens are kept; by default beside the `datasets` cache.
        progress: Show a bar; by default where stderr is a terminal.

    Raises:
        DataError: a row cannot be read or encoded, or the cache cannot be written.
    """
    key = cache_key(source, layout, encoder)
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "halfbyte") / key
    hint = "set cache_dir to a folder that can be written to, or delete it to begin afresh"
    try:
        was_there = any(folder.glob("tokens*.arrow"))
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bars(shown=sys.stderr.isatty() if progress is None else progress):
            tokens = source.rows.map(
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
        return TokenRows.from_dataset(tokens), was_there
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"the token cache {folder} cannot be used: {error}", hint=hint) from error


def tokenize_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    encoder: ChatEncoder,
    layout: Layout,
) -> dict[str, list[Any]]:
    """Return the columns of the rows of tokens of one batch of source rows."""
    examples = [(where, layout.read(row, where)) for where, row in decode(batch, indices)]
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for index, rows in zip(indices, encoder.encode(examples), strict=True):
        for row in rows:
            columns["input_ids"].append(row.input_ids)
            columns["labels"].append(row.labels)
            columns["source"].append(index)
            columns["notes"].append(int(row.notes))
    return columns


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
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


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
