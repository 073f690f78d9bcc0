"""What became of the rows, in numbers."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from halfbyte.data.findings import Finding
from halfbyte.data.notes import Note

PERCENTILES = (50, 90, 95, 99, 100)
COUNTED_NOTES = (
    Note.EOS_APPENDED,
    Note.REWRITTEN,
    Note.SPECIAL_TEXT,
    Note.SPECIAL_TOKEN,
    Note.NO_STOP,
)


@dataclass(frozen=True)
class SplitSummary:
    """Counts over the rows of one split, train or eval.

    Every count of rows is of training rows, except `rows_read`; one conversation may become
    several rows (`rewritten`), and with `over_length: split` one row several windows.
    """

    rows_read: int
    """Rows in the source that could be read."""
    unreadable_rows: int
    """Left out: they could not be read, or not be made into tokens."""
    rows: int
    """Rows that are trained on."""
    total_tokens: int
    """Their tokens."""
    supervised_tokens: int
    """Those of them that are learned."""
    unsupervised_rows: int
    """Dropped: nothing in them would be learned."""
    over_length_rows: int
    """Longer than `max_length` before the policy was applied."""
    dropped_rows: int
    """Dropped by the policy for being longer."""
    lost_tokens: int
    """Tokens that truncating or dropping took away."""
    lost_supervised_tokens: int
    """Those of them that would have been learned."""
    lost_stops: int
    """Rows whose last stop token was cut off."""
    eos_appended: int
    """Rows that got an EOS, as the chat template leaves no stop token at their end."""
    rewritten: int
    """Rows that are one of several of a conversation whose earlier turns the template rewrites."""
    special_text: int
    """Rows with text that spells a special token, kept as text."""
    special_token: int
    """Rows where such text became the special token, as this tokenizer cannot avoid it."""
    no_stop: int
    """Rows without a stop token, as the tokenizer has none."""
    percentiles: dict[int, int] = field(default_factory=dict)
    """Length in tokens at these percentiles, after the policy."""
    sources: dict[str, int] = field(default_factory=dict)
    """Learned tokens of each file, where rows come from several."""


@dataclass(frozen=True)
class Summary:
    """What was prepared.

    Args:
        train: Counts of the training rows.
        eval: Counts of the held-out rows, if there are any.
        eval_overlap: Held-out rows that are also in the training rows, token for token.
        format: The format that the rows were read as.
        stop: The stop token of the chat template, if it is a conversation.
        seconds: Time that preparing took.
        from_cache: Whether the tokens were already there.
        findings: What the audit found.
    """

    train: SplitSummary
    eval: SplitSummary | None
    eval_overlap: int
    format: str
    stop: str | None
    seconds: float
    from_cache: bool
    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def __rich__(self) -> Group:
        """Return a table of the counts that are not zero, and the findings."""
        return Group(self._table(), *self.findings)

    def _table(self) -> Table:
        table = Table(title=f"data ({self.format})", title_justify="left")
        table.add_column("")
        splits = [("train", self.train)] + ([("eval", self.eval)] if self.eval else [])
        for name, _ in splits:
            table.add_column(name, justify="right")
        for key, label in _LABELS.items():
            values = [getattr(split, key) for _, split in splits]
            if any(values) or key in _ALWAYS:
                table.add_row(label, *(f"{value:,}" for value in values))
        for percent in PERCENTILES:
            label = "longest row" if percent == 100 else f"length, {percent} % are at most"
            table.add_row(label, *(f"{split.percentiles[percent]:,}" for _, split in splits))
        if self.eval_overlap:
            table.add_row("held-out rows that are also trained on", "", f"{self.eval_overlap:,}")
        if self.stop:
            table.add_row("stop token", self.stop.replace("[", r"\["))
        cached = " (from cache)" if self.from_cache else ""
        table.add_row("seconds", f"{self.seconds:.1f}{cached}")
        return table


def length_percentiles(lengths: NDArray[np.int64]) -> dict[int, int]:
    """Return the length that the given percentages of rows do not exceed."""
    if not len(lengths):
        return dict.fromkeys(PERCENTILES, 0)
    values = np.percentile(lengths, PERCENTILES, method="higher")
    return {percent: int(value) for percent, value in zip(PERCENTILES, values, strict=True)}


_ALWAYS = frozenset({"rows_read", "rows", "total_tokens", "supervised_tokens"})
_LABELS = {
    "rows_read": "rows read",
    "unreadable_rows": "left out: not readable",
    "rows": "rows",
    "total_tokens": "tokens",
    "supervised_tokens": "learned tokens",
    "unsupervised_rows": "dropped: nothing to learn",
    "over_length_rows": "longer than max_length",
    "dropped_rows": "dropped: too long",
    "lost_tokens": "tokens lost",
    "lost_supervised_tokens": "learned tokens lost",
    "lost_stops": "rows that lost their stop token",
    "eos_appended": "rows given an EOS",
    "rewritten": "rows of rewritten conversations",
    "special_text": "rows that spell a special token (kept as text)",
    "special_token": "rows that spell a special token (became one)",
    "no_stop": "rows without a stop token",
}
