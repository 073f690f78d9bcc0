"""Rows that say nearly the same, found without comparing every row with every other.

A text is the set of its shingles, the runs of eight bytes in it (lower case, spaces joined); two
texts are alike by the share of shingles that they have in common (Jaccard). MinHash (Broder 1997)
estimates that from a signature: each shingle gets a random number and falls into one of 64
drawers, and a drawer keeps its smallest number (one-permutation hashing, Li, Owen & Zhang 2012;
empty drawers borrow from the next full one, Shrivastava & Li 2014). The share of equal drawers is
an estimate of the share of equal shingles.

Candidates share all four drawers of one of sixteen bands (locality-sensitive hashing): a pair that
is 80 % alike does with a chance of 1 - (1 - 0.8^4)^16, above 99.9 %. Within a band rows are sorted
and only neighbours are compared, so the cost grows with the rows and not with the pairs.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.packing import mix

SHINGLE_BYTES = 8
DRAWERS = 64
_BAND = 4
ALIKE = 0.8
MAX_TEXT = 1 << 16
_PART_BYTES = 1 << 20
_EMPTY = np.uint32(0xFFFFFFFF)

Signatures = NDArray[np.uint32]
Found = NDArray[np.int64]


def signatures(texts: Sequence[str]) -> Signatures:
    """Return the MinHash signatures of texts, of their first 64 KiB each: uint32 [N, 64]."""
    encoded = [_normal(text[:MAX_TEXT]) for text in texts]
    parts, first, size = [], 0, 0
    for number, text in enumerate(encoded):
        size += len(text)
        if size >= _PART_BYTES or number == len(encoded) - 1:
            parts.append(_signatures(encoded[first : number + 1]))
            first, size = number + 1, 0
    return np.concatenate(parts) if parts else np.empty((0, DRAWERS), dtype=np.uint32)


def _signatures(encoded: Sequence[bytes]) -> Signatures:
    """Return the signatures of normal texts; it takes about 50 bytes of memory for each byte."""
    counts = np.array([len(text) - SHINGLE_BYTES + 1 for text in encoded], dtype=np.int64)
    data = np.frombuffer(b"".join(encoded) + bytes(SHINGLE_BYTES), dtype=np.uint8)
    starts = np.cumsum([0, *(len(text) for text in encoded[:-1])])
    owner = np.repeat(np.arange(len(encoded)), counts)
    at = np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
    shingles = np.ndarray(len(data) - SHINGLE_BYTES + 1, np.uint64, data, strides=(1,))
    hashes = mix(shingles[at])
    drawers = owner * DRAWERS + (hashes & np.uint64(DRAWERS - 1)).astype(np.int64)
    found = np.full(len(encoded) * DRAWERS, _EMPTY)
    np.minimum.at(found, drawers, (hashes >> np.uint64(32)).astype(np.uint32))
    return _borrow(found.reshape(-1, DRAWERS))


def _normal(text: str) -> bytes:
    joined = " ".join(text.lower().split())
    return joined.encode("utf-8", "replace").ljust(SHINGLE_BYTES)


def _borrow(found: Signatures) -> Signatures:
    """Fill empty drawers from the next full one, with how far it was mixed in."""
    full = found != _EMPTY
    if full.all():
        return found
    positions = np.where(full, np.arange(DRAWERS), 2 * DRAWERS)
    doubled = np.concatenate([positions, positions + DRAWERS], axis=1)
    following = np.minimum.accumulate(doubled[:, ::-1], axis=1)[:, ::-1][:, :DRAWERS]
    distance = (following - np.arange(DRAWERS)).astype(np.uint32)
    borrowed = np.take_along_axis(found, following % DRAWERS, axis=1)
    return borrowed + distance * np.uint32(0x9E3779B1)


def likeness(first: Signatures, second: Signatures) -> NDArray[np.float64]:
    """Return the estimated share of common shingles of signatures, pair by pair."""
    return np.asarray((first == second).mean(axis=-1))


def earlier_twins(rows: Signatures) -> Found:
    """Return for each row an earlier one that is alike, or -1: int64 [N]."""
    twins = np.full(len(rows), -1, dtype=np.int64)
    for keys in _bands(rows):
        order = np.argsort(keys, kind="stable")
        before, after = order[:-1], order[1:]
        candidates = (keys[before] == keys[after]) & (twins[after] < 0)
        before, after = before[candidates], after[candidates]
        alike = likeness(rows[before], rows[after]) >= ALIKE
        twins[after[alike]] = before[alike]
    return twins


def twins_among(rows: Signatures, others: Signatures) -> Found:
    """Return for each row one of `others` that is alike, or -1: int64 [N]."""
    twins = np.full(len(rows), -1, dtype=np.int64)
    if not len(others):
        return twins
    for keys, other_keys in zip(_bands(rows), _bands(others), strict=True):
        order = np.argsort(other_keys, kind="stable")
        place = np.searchsorted(other_keys[order], keys)
        place = order[np.minimum(place, len(order) - 1)]
        open_ = np.flatnonzero((other_keys[place] == keys) & (twins < 0))
        alike = likeness(rows[open_], others[place[open_]]) >= ALIKE
        twins[open_[alike]] = place[open_[alike]]
    return twins


def _bands(rows: Signatures) -> list[NDArray[np.uint64]]:
    """Return one key a row for each band, equal where its drawers are."""
    keys = []
    for start in range(0, DRAWERS, _BAND):
        key = np.zeros(len(rows), dtype=np.uint64)
        for drawer in range(start, start + _BAND):
            key = mix(key ^ rows[:, drawer])
        keys.append(key)
    return keys
