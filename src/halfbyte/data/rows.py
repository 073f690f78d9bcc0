"""Rows of tokens, held flat.

All rows lie one behind another in two arrays, with the offsets where each begins, so that
selecting, cutting and hashing them are a few array operations however many there are:

    input_ids  a a a b b c c c c
    offsets    0     3   5       9
"""

import hashlib
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import datasets
import numpy as np
import pyarrow
from numpy.typing import NDArray

from halfbyte.data.chat import IGNORE_INDEX

IntArray = NDArray[np.int64]
TokenArray = NDArray[np.int32]


@dataclass(frozen=True)
class TokenRows:
    """R rows of T tokens in all.

    Args:
        input_ids: int32 [T].
        labels: int32 [T], -100 where nothing is learned.
        offsets: int64 [R + 1].
        source: int64 [R], the number of the source row that each row comes from.
        notes: int64 [R], `halfbyte.data.chat.Note` of each.
    """

    input_ids: TokenArray
    labels: TokenArray
    offsets: IntArray
    source: IntArray
    notes: IntArray

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def supervised(self) -> IntArray:
        """Learned tokens of each row."""
        counts = np.zeros(len(self), dtype=np.int64)
        is_long = self.lengths > 0
        starts = self.offsets[:-1][is_long]  # an empty row would be given the next one's token
        counts[is_long] = np.add.reduceat(self.labels != IGNORE_INDEX, starts, dtype=np.int64)
        return counts

    @property
    def learned_lengths(self) -> IntArray:
        """Tokens of each row up to its last learned one."""
        positions = np.where(self.labels != IGNORE_INDEX, np.arange(1, len(self.labels) + 1), 0)
        last = np.maximum.accumulate(np.concatenate([[0], positions]))[self.offsets[1:]]
        return np.asarray(np.maximum(last - self.offsets[:-1], 0), dtype=np.int64)

    def select(self, chosen: NDArray[np.bool_] | IntArray) -> "TokenRows":
        """Return the chosen rows (a mask or row numbers)."""
        is_mask = chosen.dtype == np.bool_
        rows = np.flatnonzero(chosen) if is_mask else chosen.astype(np.int64)
        return self.cut(rows, self.offsets[:-1][rows], self.offsets[1:][rows])

    def cut(self, rows: IntArray, starts: IntArray, ends: IntArray) -> "TokenRows":
        """Return new rows: tokens [starts[i], ends[i]) of all, which lie in the old row `rows[i]`.

        The first label of each is not learned, as nothing in it predicts that token.
        """
        lengths = ends - starts
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        taken = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        labels = self.labels[taken]
        labels[offsets[:-1][lengths > 0]] = IGNORE_INDEX
        return TokenRows(
            self.input_ids[taken], labels, offsets, self.source[rows], self.notes[rows]
        )

    def keys(self) -> list[bytes]:
        """Return a 16-byte key of each row's tokens: equal for equal rows."""
        edges = self.offsets.tolist()
        return [
            hashlib.blake2b(self.input_ids[a:b].tobytes(), digest_size=16).digest()
            for a, b in itertools.pairwise(edges)
        ]

    def digest(self) -> str:
        """Return the SHA-256 of tokens, labels and where rows begin."""
        sha = hashlib.sha256()
        for array in (self.input_ids, self.labels, self.offsets):
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def to_dataset(self) -> datasets.Dataset:
        """Return the rows with the columns `input_ids`, `labels` and `source`."""
        columns = {
            name: pyarrow.LargeListArray.from_arrays(self.offsets, values)
            for name, values in (("input_ids", self.input_ids), ("labels", self.labels))
        }
        return datasets.Dataset(pyarrow.table({**columns, "source": self.source}))

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> Self:
        """Read the rows that have tokens from the columns that have this class's names."""
        table = dataset.with_format("arrow")[:]
        lists = [table["input_ids"].combine_chunks(), table["labels"].combine_chunks()]
        lengths = lists[0].value_lengths().to_numpy(zero_copy_only=False)
        input_ids, labels = (part.flatten().to_numpy(zero_copy_only=False) for part in lists)
        has_tokens = lengths > 0
        return cls(
            input_ids.astype(np.int32, copy=False),
            labels.astype(np.int32, copy=False),
            np.concatenate([[0], np.cumsum(lengths[has_tokens])]).astype(np.int64),
            table["source"].to_numpy()[has_tokens].astype(np.int64),
            table["notes"].to_numpy()[has_tokens].astype(np.int64),
        )
