"""Several short rows in one sequence, so that few tokens are padding.

First-fit-decreasing: rows, longest first, go into the first sequence that has room. It needs at
most 11/9 of the best possible number of sequences (plus one), and in practice under 1 % more.
Rows of equal length are taken in the epoch's shuffled order, and so are the finished sequences;
the number of sequences depends on the lengths alone, so every epoch has as many steps.

Four rows of 5, 3, 2 and 2 tokens, packed into sequences of at most 8:

    input_ids      a a a a a b b b     c c d d . . . .
    labels         - a a a a - b b     - c - d - - - -
    position_ids   0 1 2 3 4 0 1 2     0 1 0 1 0 1 2 3

    attention of the second sequence (x: the row's token sees the column's)

           c c d d . . . .
         c x
         c x x
         d     x
         d     x x
         .         x
         .         x x
         .         x x x
         .         x x x x

`-` is a label that is not learned. The first token of each document is one, so that the shift of
labels by one never predicts across a boundary. Positions begin again with each document, padding
included: a sequence bound is wherever a position is 0, and transformers builds the
block-diagonal mask above from just that when there is no attention mask.
"""

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def shuffled(count: int, *, seed: int, epoch: int, stream: int = 0) -> IntArray:
    """Return the numbers below `count` in an order that seed, epoch and stream fix for ever.

    Each number is given a 64-bit key by splitmix64 (Steele, Lea & Flood 2014) and sorted by it.
    NumPy's and torch's generators may change between versions; a resumed run must not.
    """
    start = mix(np.array([seed, epoch, stream], dtype=np.int64).astype(np.uint64))
    key = mix(mix(start[0:1] ^ np.uint64(1)) ^ start[1:2])
    key = mix(key ^ mix(start[2:3] ^ np.uint64(2)))
    keys = mix(np.arange(count, dtype=np.uint64) ^ key)
    return np.argsort(keys, kind="stable").astype(np.int64)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return splitmix64's output function of `x`: a permutation of the 64-bit integers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pack(
    lengths: IntArray, capacity: int, *, seed: int, epoch: int, shuffle: bool = True
) -> list[IntArray]:
    """Return sequences as arrays of row numbers; each row is in exactly one.

    Args:
        lengths: Tokens of each row.
        capacity: Tokens of a sequence.
        seed: Of the run.
        epoch: From 0.
        shuffle: Without it, rows of equal length and sequences keep the rows' order.

    Raises:
        ValueError: a row is longer than `capacity`, or empty.
    """
    count = len(lengths)
    if count == 0:
        return []
    if lengths.max() > capacity or lengths.min() < 1:
        raise ValueError(
            f"expected rows of 1 to {capacity} tokens, got {lengths.min()} to {lengths.max()}"
        )
    order = shuffled(count, seed=seed, epoch=epoch) if shuffle else np.arange(count)
    order = order[np.argsort(-lengths[order], kind="stable")]
    bins = _first_fit(lengths[order], capacity)
    by_bin = np.argsort(bins, kind="stable")
    edges = np.cumsum(np.bincount(bins))[:-1]
    sequences = np.split(order[by_bin], edges)
    if not shuffle:
        return sorted(sequences, key=lambda rows: int(rows.min()))
    return [sequences[i] for i in shuffled(len(sequences), seed=seed, epoch=epoch, stream=1)]


def _first_fit(lengths: IntArray, capacity: int) -> IntArray:
    """Return the sequence number of each row; `lengths` descend.

    Rows of one length are placed together: sequence by sequence, as many as there is room for.
    That is what first fit does with them one by one.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    room = np.empty(0, dtype=np.int64)
    values, counts = np.unique(-lengths, return_counts=True)
    done = 0
    for length, count in zip(-values, counts, strict=True):
        fits = room // length
        missing = int(count - fits.sum())
        if missing > 0:
            each = capacity // length
            opened = np.full(-(-missing // each), capacity, dtype=np.int64)
            room = np.concatenate([room, opened])
            fits = room // length
        before = np.cumsum(fits) - fits
        taken = np.clip(count - before, 0, fits)
        bins[done : done + count] = np.repeat(np.arange(len(room)), taken)
        room -= taken * length
        done += count
    return bins
