"""Rows that are there twice: among themselves, or in training and held-out rows both."""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.findings import Finding, Level
from halfbyte.data.gather import Split
from halfbyte.data.similar import ALIKE, Signatures, earlier_twins, twins_among

NUM_EXAMPLES = 3
_DUPLICATE_SHARE = 0.05
IntArray = NDArray[np.int64]


def duplicates(name: str, data: Split, at: Callable[[int], str]) -> Iterator[Finding]:
    """Yield what rows of a split repeat earlier ones, token for token or nearly.

    Args:
        name: Of the split.
        data: The split.
        at: Describes a source row by its number.
    """
    numbers, keys = row_keys(data)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    is_first = first[inverse] == np.arange(len(keys))
    pairs = [(numbers[i], numbers[first[inverse[i]]]) for i in np.flatnonzero(~is_first)]
    level = Level.WARNING if len(pairs) > _DUPLICATE_SHARE * len(keys) else Level.INFO
    yield from _pairs(
        "duplicates",
        level,
        name,
        pairs,
        f"of {len(keys):,} rows of {data.title} repeat another",
        at,
    )
    unique = numbers[is_first]
    twins = earlier_twins(_signatures(data, unique))
    pairs = [(unique[i], unique[twins[i]]) for i in np.flatnonzero(twins >= 0)]
    level = Level.WARNING if len(pairs) > _DUPLICATE_SHARE * len(keys) else Level.INFO
    said = f"of {len(keys):,} rows of {data.title} are at least {ALIKE:.0%} like another"
    yield from _pairs("near_duplicates", level, name, pairs, said, at)


def overlaps(train: Split, held_out: Split, at: Callable[[int], str]) -> Iterator[Finding]:
    """Yield what held-out rows are trained on too, token for token or nearly."""
    numbers, keys = row_keys(train)
    held_numbers, held_keys = row_keys(held_out)
    seen = dict(zip(keys.tolist(), numbers.tolist(), strict=True))
    exact = [
        (number, seen[key])
        for number, key in zip(held_numbers.tolist(), held_keys.tolist(), strict=True)
        if key in seen
    ]
    total = f"of {len(held_keys):,} held-out rows"
    yield from _pairs(
        "eval_overlap", Level.WARNING, "eval", exact, f"{total} are trained on as well", at, train
    )
    rest = held_numbers[~np.isin(held_numbers, [number for number, _ in exact])]
    twins = twins_among(_signatures(held_out, rest), _signatures(train, numbers))
    near = [(rest[i], numbers[twins[i]]) for i in np.flatnonzero(twins >= 0)]
    said = f"{total} are at least {ALIKE:.0%} like one that is trained on"
    yield from _pairs("eval_near_overlap", Level.WARNING, "eval", near, said, at, train)


def row_keys(data: Split) -> tuple[IntArray, NDArray[np.object_]]:
    """Return the source rows that have tokens, and a key of the tokens of each."""
    rows = data.rows
    numbers, first = np.unique(rows.source, return_index=True)
    edges = rows.offsets[np.append(first, len(rows))]
    keys = [
        hashlib.blake2b(rows.input_ids[a:b].tobytes(), digest_size=16).digest()
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    return numbers, np.array(keys, dtype=object)


def _signatures(data: Split, numbers: IntArray) -> Signatures:
    return data.facts.signatures[np.searchsorted(data.facts.source, numbers)]


def _pairs(
    name: str,
    level: Level,
    split: str,
    pairs: list[tuple[int, int]],
    said: str,
    at: Callable[[int], str],
    others: Split | None = None,
) -> Iterator[Finding]:
    if not pairs:
        return
    examples = []
    for number, other in pairs[:NUM_EXAMPLES]:
        like = others.source.row(int(other))[0] if others else at(int(other)).partition(": ")[0]
        examples.append(f"{at(int(number))} (like {like})")
    hint = (
        "measure on rows that are not trained on"
        if others
        else "keep one of each, unless repeating them is meant"
    )
    yield Finding(name, level, split, len(pairs), f"{len(pairs):,} {said}", hint, tuple(examples))
