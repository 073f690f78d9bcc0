"""A report on all rows of a run, before anything is trained.

It reads what `prepare` reads and keeps the tokens where `prepare` keeps them, so that training
afterwards tokenizes nothing again. No weights are needed, only the tokenizer.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from halfbyte.data.checks import check
from halfbyte.data.config import DataConfig
from halfbyte.data.findings import Finding, ruinous
from halfbyte.data.gather import Gathered, InMemory, Split, gather

NUM_BARS = 12
_BAR_WIDTH = 40


@dataclass(frozen=True)
class Bar:
    """Rows of `first` to `last` tokens."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class SplitReport:
    """Counts over all rows of a split, before any is dropped or cut.

    Args:
        rows_read: Rows of the source that could be read.
        rows: Rows of tokens that they became.
        total_tokens: Their tokens.
        supervised_tokens: Those of them that are learned.
        min: Length of the shortest row, in tokens.
        median: Half of the rows are at most as long.
        p95: 95 % of the rows are at most as long.
        max: Length of the longest row.
        histogram: Rows by length.
    """

    rows_read: int
    rows: int
    total_tokens: int
    supervised_tokens: int
    min: int
    median: int
    p95: int
    max: int
    histogram: tuple[Bar, ...]


@dataclass(frozen=True)
class Report:
    """What the audit of a run's data says.

    Args:
        splits: "train" and, where there are held-out rows, "eval".
        findings: The worst first.
        format: What the rows were read as.
        stop: The token that ends what is learned.
        seconds: Time that it took.
        from_cache: Whether the tokens were already there.
    """

    splits: dict[str, SplitReport]
    findings: tuple[Finding, ...]
    format: str
    stop: str | None
    seconds: float
    from_cache: bool

    @property
    def ruins(self) -> bool:
        """Whether training on these data would be refused."""
        return bool(ruinous(self.findings))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**asdict(self), "ruins": self.ruins}

    def __rich__(self) -> Group:
        """Return tables, histograms and findings."""
        parts: list[Any] = [_counts(self)]
        for name, split in self.splits.items():
            parts += [Text(f"\nlengths of {name} rows, in tokens"), _histogram(split.histogram)]
        parts.append(Text(f"\n{verdict(self)}"))
        return Group(*parts, *self.findings)


def audit(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    rows: InMemory | None = None,
    eval_rows: InMemory | None = None,
    progress: bool | None = None,
) -> tuple[Report, Gathered]:
    """Tokenize and look at every row; return the report, and the rows to show.

    Args:
        config: The data.
        tokenizer: The model's.
        seed: Of the run: it chooses the rows that `eval_fraction` holds out.
        rows: Rows in memory, instead of `config.path`.
        eval_rows: Held-out rows in memory, instead of `config.eval_path`.
        progress: Show bars; by default where stderr is a terminal.

    Raises:
        DataError: there are no rows at all, or none whose format is known.
    """
    started = time.perf_counter()
    gathered = gather(
        config, tokenizer, seed=seed, rows=rows, eval_rows=eval_rows, progress=progress
    )
    findings = check(gathered, config)
    return Report(
        splits={name: _report(split) for name, split in gathered.splits.items()},
        findings=tuple(findings),
        format=gathered.train.layout.format,
        stop=gathered.stop,
        seconds=time.perf_counter() - started,
        from_cache=gathered.train.from_cache,
    ), gathered


def verdict(report: Report) -> str:
    """Return in one line whether the data can be trained on."""
    count = len(ruinous(report.findings))
    if not report.findings:
        return "nothing was found"
    if count:
        return f"{count} finding{'s' if count > 1 else ''} would ruin the model: train refuses them"
    return "nothing that ruins a model"


def _report(split: Split) -> SplitReport:
    lengths = split.rows.lengths
    shown = lengths if len(lengths) else np.zeros(1, dtype=np.int64)
    median, p95 = (int(np.percentile(shown, p, method="higher")) for p in (50, 95))
    return SplitReport(
        rows_read=split.num_read,
        rows=len(lengths),
        total_tokens=int(lengths.sum()),
        supervised_tokens=int(split.rows.supervised.sum()),
        min=int(shown.min()),
        median=median,
        p95=p95,
        max=int(shown.max()),
        histogram=histogram(lengths),
    )


def histogram(lengths: NDArray[np.int64]) -> tuple[Bar, ...]:
    """Return at most twelve bars of equal width that hold all rows."""
    if not len(lengths):
        return ()
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // NUM_BARS))
    counts = np.bincount((lengths - low) // width)
    return tuple(
        Bar(low + i * width, low + (i + 1) * width - 1, int(count))
        for i, count in enumerate(counts)
    )


def _counts(report: Report) -> Table:
    table = Table(title=f"audit ({report.format})", title_justify="left")
    table.add_column("")
    for name in report.splits:
        table.add_column(name, justify="right")
    for key, label in _LABELS.items():
        values = [getattr(split, key) for split in report.splits.values()]
        table.add_row(label, *(f"{value:,}" for value in values))
    if report.stop:
        table.add_row("stop token", Text(report.stop))
    cached = " (tokens from cache)" if report.from_cache else ""
    table.add_row("seconds", f"{report.seconds:.1f}{cached}")
    return table


def _histogram(bars: tuple[Bar, ...]) -> Text:
    most = max((bar.rows for bar in bars), default=1)
    width = len(f"{bars[-1].last:,}") if bars else 1
    lines = [
        f"  {bar.first:>{width},} - {bar.last:>{width},}  "
        f"{'█' * -(-bar.rows * _BAR_WIDTH // most):<{_BAR_WIDTH}} {bar.rows:,}"
        for bar in bars
    ]
    return Text("\n".join(lines), no_wrap=True)


_LABELS = {
    "rows_read": "rows read",
    "rows": "rows of tokens",
    "total_tokens": "tokens",
    "supervised_tokens": "learned tokens",
    "min": "shortest row",
    "median": "median length",
    "p95": "95 % are at most",
    "max": "longest row",
}
