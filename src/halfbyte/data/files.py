"""Local text files as validated rows, one JSON object each.

Rows stay JSON text until they are tokenized: Arrow would force one schema on all of them, which
fills nested objects (tool calls above all) with keys that were never there.
Files are read as a stream, once; every error names the file and the line.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from halfbyte.errors import DataError

MAX_LINE_BYTES = 1 << 26
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row: a JSON object as text, with where it came from (`train.jsonl line 3`)."""

    json: str
    where: str


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSONL, JSON, CSV, TSV or text file; blank lines are skipped.

    Raises:
        DataError: the file is missing, empty, no regular file, of an unknown kind, not UTF-8, or
            broken at some line.
    """
    check_regular(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"expected a file that ends in {', '.join([*READERS, '.parquet'])}, got {path}",
            hint="unpack archives first, or rename the file to what it holds",
        )
    found = False
    for row in reader(path):
        found = True
        yield row
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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line end) of a UTF-8 file, without its byte-order mark."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path} line {number} is longer than {MAX_LINE_BYTES >> 20} MiB",
                        hint="is it one JSON object per line?",
                    )
                yield number, _decode(raw.removeprefix(_BOM) if number == 1 else raw, path, number)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {number}: byte 0x{raw[error.start]:02x} at position {error.start + 1} "
            "is not UTF-8",
            hint=f"convert the file: iconv -f <its encoding> -t utf-8 {path.name}",
        ) from error


def parse_json(text: str, where: str) -> object:
    """Return the value of a JSON text.

    Raises:
        DataError: it is broken, nested too deeply, or holds an absurd number.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text.strip() else f"line {error.lineno}"
        raise DataError(
            f"{where}: broken JSON at {place}: {error.msg}",
            hint="expected one JSON object per line, or one array of objects",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: this JSON cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    first = True
    for number, line in _lines(path):
        text = line.strip()
        if not text:
            continue
        if first and text.startswith("["):
            yield from _read_array(path)
            return
        first = False
        where = f"{path.name} line {number}"
        _check_object(parse_json(text, where), where)
        yield Row(text, where)


def _read_array(path: Path) -> Iterator[Row]:
    text = "".join(line for _, line in _lines(path))
    values = parse_json(text, path.name)
    if not isinstance(values, list):
        raise DataError(f"{path.name}: expected an array of objects")
    for number, value in enumerate(values, 1):
        where = f"{path.name} row {number}"
        _check_object(value, where)
        yield Row(json.dumps(value), where)


def _check_object(value: object, where: str) -> None:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: expected a JSON object with named columns, got {type(value).__name__}",
            hint='write rows like {"prompt": "...", "completion": "..."}',
        )


def _read_csv(path: Path) -> Iterator[Row]:
    """Yield rows with every value as text, so that `007` stays `007`."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in record or None in record.values():
                raise DataError(
                    f"{where}: expected {len(reader.fieldnames or ())} columns as in the header, "
                    f"got {'more' if None in record else 'fewer'}",
                    hint="put values that hold the delimiter or line breaks in double quotes",
                )
            yield Row(json.dumps(record), where)
    except csv.Error as error:
        raise DataError(
            f"{path.name} line {reader.line_num}: {error}", hint="long or odd text: use JSONL"
        ) from error


def _read_text(path: Path) -> Iterator[Row]:
    """Yield each line that is not blank as `{"text": line}`."""
    for number, line in _lines(path):
        text = line.rstrip("\r\n")
        if text.strip():
            yield Row(json.dumps({"text": text}), f"{path.name} line {number}")


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


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".md": _read_text,
}
