"""Local text files as validated rows, one JSON object each.

Rows stay JSON text until they are tokenized: Arrow would force one schema on all of them, which
fills nested objects (tool calls above all) with keys that were never there.
Files are read as a stream, once. A line that cannot be read becomes a `Broken` in the rows' place,
so that one pass finds all of them; whoever wants whole files only raises the first.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from halfbyte.errors import DataError

MAX_LINE_BYTES = 1 << 26
# A file with more is of another kind, and its reader stops.
MAX_BROKEN_ROWS = 1000
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row: a JSON object as text, with where it came from (`train.jsonl line 3`)."""

    json: str
    where: str


class Broken(NamedTuple):
    """A row that cannot be read, or made into tokens.

    Args:
        where: The row, as in `Row`, or the file.
        message: What is wrong, `where` included.
        hint: What to do about it.
    """

    where: str
    message: str
    hint: str | None = None

    @property
    def file(self) -> str:
        """The file that the row is in; empty for rows in memory."""
        return re.sub(r"\b(line|row) \d+.*$", "", self.where).strip()

    def error(self) -> DataError:
        """Return it as an exception."""
        return DataError(self.message, hint=self.hint)

    @classmethod
    def of(cls, where: str, error: DataError) -> "Broken":
        """Return what an exception says about the row at `where`."""
        return cls(where, error.message, error.hint)


def read_file(path: Path) -> Iterator[Row | Broken]:
    """Yield the rows of a JSONL, JSON, CSV, TSV or text file; blank lines are skipped.

    Raises:
        DataError: the file is missing, empty, no regular file, of an unknown kind, or unreadable.
    """
    check_regular(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"expected a file that ends in {', '.join([*READERS, '.parquet'])}, got {path}",
            hint="unpack archives first, or rename the file to what it holds",
        )
    found = num_broken = 0
    for row in reader(path):
        found += 1
        num_broken += isinstance(row, Broken)
        yield row
        if num_broken > MAX_BROKEN_ROWS:
            yield Broken(
                path.name,
                f"{path.name}: more than {MAX_BROKEN_ROWS:,} rows cannot be read; the rest of the "
                "file was left out",
                "is it a file of another kind?",
            )
            return
    if not found:
        raise DataError(f"{path} holds only blank lines (or a header)", hint="it has no rows")


def check_regular(path: Path) -> None:
    """Raise DataError unless `path` is a regular file with something in it."""
    if not path.exists():
        raise DataError(f"there is no file {path}", hint="check the path")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "no regular file (a pipe or device)"
        raise DataError(f"expected a file, but {path} is {kind}", hint="name a file")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes)", hint="write rows into it, or name another")


def _lines(path: Path) -> Iterator[tuple[int, str | Broken]]:
    """Yield (line number, text with its line end) of a UTF-8 file, without its byte-order mark."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path.name} line {number}"
                if len(raw) > MAX_LINE_BYTES:
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(MAX_LINE_BYTES)
                    said = f"{where} is longer than {MAX_LINE_BYTES >> 20} MiB"
                    yield number, Broken(where, said, "is it one JSON object per line?")
                else:
                    yield number, _decode(raw.removeprefix(_BOM) if number == 1 else raw, where)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _decode(raw: bytes, where: str) -> str | Broken:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Broken(
            where,
            f"{where}: byte 0x{raw[error.start]:02x} at position {error.start + 1} is not UTF-8",
            "convert the file: iconv -f <its encoding> -t utf-8 <the file>",
        )


def _whole_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file that is read as a whole.

    Raises:
        DataError: a line is broken.
    """
    for _, line in _lines(path):
        if isinstance(line, Broken):
            raise line.error()
        yield line


def parse_json(text: str, where: str) -> object:
    """Return the value of a JSON text.

    Raises:
        DataError: it is broken, nested too deeply, or holds an absurd number.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}"
        raise DataError(
            f"{where}: broken JSON at {place}: {error.msg}",
            hint="expected one JSON object per line, or one array of objects",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: this JSON cannot be read: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the object of these pairs; which of two equal keys counts, JSON leaves open."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands in one object twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _read_jsonl(path: Path) -> Iterator[Row | Broken]:
    first = True
    for number, line in _lines(path):
        if isinstance(line, Broken):
            first = False
            yield line
            continue
        text = line.strip()
        if not text:
            continue
        if first and text.startswith("["):
            yield from _read_array(path)
            return
        first = False
        yield _object(text, f"{path.name} line {number}")


def _object(text: str, where: str) -> Row | Broken:
    try:
        _check_object(parse_json(text, where), where)
    except DataError as error:
        return Broken.of(where, error)
    return Row(text, where)


def _read_array(path: Path) -> Iterator[Row | Broken]:
    values = parse_json("".join(_whole_lines(path)), path.name)
    if not isinstance(values, list):
        raise DataError(f"{path.name}: expected an array of objects")
    for number, value in enumerate(values, 1):
        where = f"{path.name} row {number}"
        try:
            _check_object(value, where)
        except DataError as error:
            yield Broken.of(where, error)
        else:
            yield Row(json.dumps(value), where)


def _check_object(value: object, where: str) -> None:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: expected a JSON object with named columns, got {type(value).__name__}",
            hint='write rows like {"prompt": "...", "completion": "..."}',
        )


def _read_csv(path: Path) -> Iterator[Row | Broken]:
    """Yield rows with every value as text, so that `007` stays `007`."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(_whole_lines(path), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in record or None in record.values():
                yield Broken(
                    where,
                    f"{where}: expected {len(reader.fieldnames or ())} columns as in the header, "
                    f"got {'more' if None in record else 'fewer'}",
                    "put values that hold the delimiter or line breaks in double quotes",
                )
            else:
                yield Row(json.dumps(record), where)
    except csv.Error as error:  # how the rest is quoted cannot be told
        where = f"{path.name} line {reader.line_num}"
        yield Broken(where, f"{where}: {error}", "long or odd text: use JSONL")


def _read_text(path: Path) -> Iterator[Row | Broken]:
    """Yield each line that is not blank as `{"text": line}`."""
    for number, line in _lines(path):
        if isinstance(line, Broken):
            yield line
        elif line.strip():
            yield Row(json.dumps({"text": line.rstrip("\r\n")}), f"{path.name} line {number}")


def read_objects(rows: Iterable[object]) -> Iterator[Row]:
    """Yield in-memory rows (dictionaries) in the form that files are read in.

    Raises:
        DataError: a row is no dictionary, or holds what JSON cannot.
    """
    for number, row in enumerate(rows, 1):
        where = f"row {number}"
        _check_object(row, where)
        try:
            yield Row(json.dumps(row), where)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{where} holds something that is not text, number, list or dictionary: {error}"
            ) from error


READERS: dict[str, Callable[[Path], Iterator[Row | Broken]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".md": _read_text,
}
