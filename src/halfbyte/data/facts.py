"""What was found out about each source row while it was tokenized."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import datasets
import numpy as np
from numpy.typing import NDArray

from halfbyte.data.files import Broken
from halfbyte.data.similar import DRAWERS, Signatures
from halfbyte.data.sources import Source

IntArray = NDArray[np.int64]
# Columns in which mixed data sets say where a row comes from, the likeliest first.
_ORIGIN_COLUMNS = ("source", "dataset", "data_source", "dataset_name", "origin", "subset")
_MAX_ORIGIN = 80


@dataclass(frozen=True)
class Facts:
    """Facts of N source rows, in their order.

    Args:
        source: int64 [N], the row's number from 0.
        notes: int64 [N], `Note` of the row.
        origins: Which of several data sets it is from, where a column says so.
        signatures: uint32 [N, 64], MinHash of what is said in it.
        errors: Row number to (message, hint) of those that have no tokens for a reason.
    """

    source: IntArray
    notes: IntArray
    origins: NDArray[np.object_]
    signatures: Signatures
    errors: Mapping[int, tuple[str, str | None]]

    def __len__(self) -> int:
        return len(self.source)

    def select(self, chosen: NDArray[np.bool_]) -> "Facts":
        """Return those of the chosen rows."""
        source = self.source[chosen]
        kept = set(source.tolist())
        return Facts(
            source,
            self.notes[chosen],
            self.origins[chosen],
            self.signatures[chosen],
            {number: error for number, error in self.errors.items() if number in kept},
        )

    def broken(self, source: Source) -> list[Broken]:
        """Return the rows that could not be read or encoded, with where they stand."""
        return [
            Broken(source.row(number)[0], message, hint)
            for number, (message, hint) in self.errors.items()
        ]

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset) -> Self:
        """Read the columns that `tokenize` writes; several rows may share a source."""
        names = ["source", "notes", "error", "hint", "origin", "signature"]
        table = dataset.select_columns(names).with_format("arrow")[:]
        numbers = table["source"].to_numpy()
        source, first = np.unique(numbers, return_index=True)
        table = table.take(first)
        errors = table["error"].combine_chunks()
        signatures = table["signature"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        with_error = np.flatnonzero(errors.is_valid().to_numpy(zero_copy_only=False)).tolist()
        hints = table["hint"]
        return cls(
            source.astype(np.int64),
            table["notes"].to_numpy().astype(np.int64),
            table["origin"].to_numpy(),
            signatures.reshape(-1, DRAWERS),
            {int(source[i]): (errors[i].as_py(), hints[i].as_py()) for i in with_error},
        )


def origin_of(row: Mapping[str, Any]) -> str | None:
    """Return which data set a row says that it is from."""
    for column in _ORIGIN_COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value:
            return value[:_MAX_ORIGIN]
    return None
