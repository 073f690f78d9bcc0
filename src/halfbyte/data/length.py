"""What happens to rows that are longer than the longest sequence.

Cutting a row silently is how models come to never stop: the stop token is the first to go. So the
default is an error with the numbers, and every other policy counts what it took.
"""

from dataclasses import dataclass

import numpy as np

from halfbyte.data.rows import TokenRows
from halfbyte.errors import DataError


@dataclass(frozen=True)
class LengthCounts:
    """What the policy met and took away; fields as in `halfbyte.data.summary.SplitSummary`."""

    over_length_rows: int = 0
    dropped_rows: int = 0
    lost_tokens: int = 0
    lost_supervised_tokens: int = 0
    lost_stops: int = 0


def apply_policy(
    rows: TokenRows, policy: str, max_length: int, *, title: str
) -> tuple[TokenRows, LengthCounts]:
    """Return rows of at most `max_length` tokens, and what that cost.

    `truncate` keeps the first `max_length` tokens. `drop` drops the row. `split` cuts it into
    windows that overlap by one token: the last of a window is the first of the next, where it is
    not learned again, so that every learned token stays learned exactly once.

    Args:
        rows: Rows of any length.
        policy: "error", "truncate", "split" or "drop".
        max_length: In tokens.
        title: What the rows are called in the message.

    Raises:
        DataError: the policy is "error" and a row is longer.
    """
    is_long = rows.lengths > max_length
    num_long = int(is_long.sum())
    if not num_long:
        return rows, LengthCounts()
    starts = rows.offsets[:-1]
    ends = np.minimum(rows.offsets[1:], starts + max_length)
    cut = rows.cut(np.arange(len(rows)), starts, ends)
    stops = int((rows.learned_lengths[is_long] > max_length).sum())
    if policy == "error":
        raise _too_long(rows, cut, stops, max_length, title)
    if policy == "split":
        return _windows(rows, max_length), LengthCounts(over_length_rows=num_long)
    kept = cut if policy == "truncate" else rows.select(~is_long)
    return kept, LengthCounts(
        over_length_rows=num_long,
        dropped_rows=len(rows) - len(kept),
        lost_tokens=int(rows.offsets[-1] - kept.offsets[-1]),
        lost_supervised_tokens=int(rows.supervised.sum() - kept.supervised.sum()),
        lost_stops=stops if policy == "truncate" else 0,
    )


def _windows(rows: TokenRows, max_length: int) -> TokenRows:
    stride = max_length - 1
    counts = np.maximum(-(-(rows.lengths - 1) // stride), 1)
    numbers = np.repeat(np.arange(len(rows)), counts)
    nth = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = rows.offsets[:-1][numbers] + nth * stride
    return rows.cut(numbers, starts, np.minimum(starts + max_length, rows.offsets[1:][numbers]))


def _too_long(
    rows: TokenRows, cut: TokenRows, stops: int, max_length: int, title: str
) -> DataError:
    lengths = rows.lengths
    longest = int(lengths.argmax())
    limits = {int(np.percentile(lengths, p, method="higher")): p for p in (99, 99.9, 100)}
    advice = ", ".join(
        f"{limit} (keeps {share:g} % of rows whole)"
        for limit, share in sorted(limits.items())
        if limit > max_length
    )
    return DataError(
        f"{int((lengths > max_length).sum()):,} of {len(rows):,} rows of {title} are longer than "
        f"max_length={max_length}; the longest has {lengths[longest]:,} tokens "
        f"(row {rows.source[longest] + 1}). Cutting them would lose "
        f"{int(rows.offsets[-1] - cut.offsets[-1]):,} of {int(rows.offsets[-1]):,} tokens, "
        f"{int(rows.supervised.sum() - cut.supervised.sum()):,} of {int(rows.supervised.sum()):,} "
        f"learned tokens, and the stop token of {stops:,} rows",
        hint=f"set max_length to {advice}; or set over_length to truncate, split or drop",
    )
