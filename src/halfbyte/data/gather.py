"""Everything about the data that is known before anything is refused, dropped or cut.

`prepare` trains on it, `audit` reports it; both read the same token cache.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from halfbyte.data.chat import ChatEncoder
from halfbyte.data.config import DataConfig
from halfbyte.data.facts import Facts
from halfbyte.data.files import Broken
from halfbyte.data.formats import Layout, detect
from halfbyte.data.packing import shuffled
from halfbyte.data.rows import TokenRows
from halfbyte.data.sources import Source, from_rows, load_source
from halfbyte.data.templates import resolve_template
from halfbyte.data.tokenize import progress_bars, tokenize
from halfbyte.errors import DataError

InMemory: TypeAlias = Sequence[Mapping[str, Any]] | datasets.Dataset


@dataclass(frozen=True)
class Split:
    """The training rows, or the held-out ones.

    Args:
        rows: Those that have tokens; one source row may have become several.
        facts: Facts of every source row that could be read.
        source: The rows before they were formatted.
        layout: How they are read.
        title: What they are called in messages.
        from_cache: Whether the tokens were already there.
    """

    rows: TokenRows
    facts: Facts
    source: Source
    layout: Layout
    title: str
    from_cache: bool

    @property
    def num_read(self) -> int:
        """Rows of the source that could be read, whether or not they became tokens."""
        return len(self.facts)

    @cached_property
    def broken(self) -> list[Broken]:
        """What could not be read or encoded."""
        return [*self.source.broken, *self.facts.broken(self.source)]

    def part(self, chosen: np.ndarray, title: str) -> "Split":
        """Return the part with these facts (a mask) and their rows."""
        facts = self.facts.select(chosen)
        rows = self.rows.select(np.isin(self.rows.source, facts.source))
        return replace(self, rows=rows, facts=facts, title=title)


@dataclass(frozen=True)
class Gathered:
    """All rows of a run, tokenized.

    Args:
        train: Rows to train on.
        eval: Held-out rows, if there are any.
        encoder: What made the tokens.
        template: The Jinja text that was used, where it is not the tokenizer's own.
    """

    train: Split
    eval: Split | None
    encoder: ChatEncoder
    template: str | None

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name."""
        return {"train": self.train} | ({"eval": self.eval} if self.eval else {})

    @property
    def stop(self) -> str | None:
        """The token that ends what is learned."""
        if self.train.layout.format == "text":
            eos: str | None = self.encoder.tokenizer.eos_token
            return eos
        return self.encoder.renderer.stop


def gather(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    rows: InMemory | None = None,
    eval_rows: InMemory | None = None,
    progress: bool | None = None,
) -> Gathered:
    """Read, format and tokenize all rows; what cannot be is noted in their facts.

    Args:
        config: What to read, and how.
        tokenizer: The model's.
        seed: Chooses the rows that `eval_fraction` holds out.
        rows: Rows in memory, instead of `config.path`.
        eval_rows: Held-out rows in memory, instead of `config.eval_path`.
        progress: Show bars; by default where stderr is a terminal.

    Raises:
        DataError: there are no rows at all, or none whose format is known.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    with progress_bars(shown=shown):
        source = _source(config, rows, eval_source=False)
        held_out = _source(config, eval_rows, eval_source=True)
    if source is None:
        raise DataError("no data: `path` is not set", hint="set `path` to a file or a hub name")
    layout = _layout(source, config)
    template = (
        None if layout.format == "text" else resolve_template(config.chat_template, tokenizer)
    )
    encoder = ChatEncoder(tokenizer, template, loss_on=config.loss_on)

    def split(source: Source, layout: Layout) -> Split:
        tokens, facts, from_cache = tokenize(
            source,
            layout,
            encoder,
            num_proc=config.num_proc,
            cache_dir=config.cache_dir,
            progress=shown,
        )
        return Split(tokens, facts, source, layout, source.title, from_cache)

    train = split(source, layout)
    evaluation = None
    if held_out is not None:
        evaluation = split(held_out, _layout(held_out, config))
    elif config.eval_fraction:
        train, evaluation = hold_out(train, config.eval_fraction, seed)
    return Gathered(train, evaluation, encoder, template)


def hold_out(data: Split, fraction: float, seed: int) -> tuple[Split, Split]:
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
    is_held = np.isin(data.facts.source, sources[np.isin(groups, order[:count])])
    return data.part(~is_held, data.title), data.part(is_held, f"the held-out part of {data.title}")


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
    source = load_source(path, name=name, split=split, cache_dir=config.cache_dir, skip_broken=True)
    if not len(source):
        raise source.broken[0].error()
    return source


def _layout(source: Source, config: DataConfig) -> Layout:
    """Return how the rows are laid out: as in most of the files, by the first row of each."""
    found: Counter[int] = Counter()
    layouts: list[Layout] = []
    errors: list[DataError] = []
    for number in source.firsts:
        try:
            layout = detect(
                config.format, config.columns, source.row(number)[1], config.system_prompt
            )
        except DataError as error:
            errors.append(error)
            continue
        if layout not in layouts:
            layouts.append(layout)
        found[layouts.index(layout)] += 1
    if not layouts:
        raise errors[0]
    return layouts[found.most_common(1)[0][0]]
