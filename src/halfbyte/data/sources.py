"""Where rows come from: files, folders, globs, the hub, or memory.

Local text becomes a `datasets.Dataset` with two columns, the row as JSON text (`ROW`) and where
it came from (`WHERE`); Parquet, hub data and a caller's own `Dataset` keep their columns.
`Source.decode` turns a batch of either into dictionaries.
"""

import dataclasses
import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from halfbyte.checkpoint.publish import sha256
from halfbyte.data.files import READERS, Broken, Row, check_regular, read_file, read_objects
from halfbyte.errors import DataError

ROW = "halfbyte_row"
WHERE = "halfbyte_where"
SUFFIXES = (*READERS, ".parquet")
# File names tell splits apart as on the hub: data/train-00000.parquet, test.jsonl.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}


@dataclass(frozen=True)
class Source:
    """Rows before they are formatted.

    Args:
        rows: The rows; JSON text in `ROW` and `WHERE`, or columns of their own.
        title: What they are called in messages.
        fingerprint: Equal for equal content; the key of the token cache.
        broken: Rows that could not be read and are left out, and files without any row.
        firsts: Number of the first row of each file.
    """

    rows: datasets.Dataset
    title: str
    fingerprint: str
    broken: tuple[Broken, ...] = ()
    firsts: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.rows)

    def first(self) -> dict[str, Any]:
        """Return the first row."""
        return self.row(0)[1]

    def row(self, number: int) -> tuple[str, dict[str, Any]]:
        """Return where row `number` (from 0) comes from, and the row."""
        return next(decode(self.rows[number : number + 1], [number]))


def decode(
    batch: Mapping[str, Sequence[Any]], indices: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) for a batch of `Source.rows`; `indices` are the rows' numbers from 0."""
    if ROW in batch:
        for text, where in zip(batch[ROW], batch[WHERE], strict=True):
            yield where, json.loads(text)
        return
    for offset, index in enumerate(indices):
        row = {name: _without_absent(values[offset]) for name, values in batch.items()}
        yield f"row {index + 1}", row


def _without_absent(value: Any) -> Any:
    """Drop nulls inside a value: Arrow gives every struct every key that any row had."""
    if isinstance(value, dict):
        return {k: _without_absent(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_absent(item) for item in value]
    return value


def from_rows(rows: Sequence[Mapping[str, Any]] | datasets.Dataset) -> Source:
    """Return a source over rows in memory.

    Raises:
        DataError: there are none, or one is no dictionary.
    """
    if isinstance(rows, datasets.Dataset):
        if not len(rows):
            raise DataError("the data set has no rows", hint="check how it was filtered")
        return Source(rows.with_format(None), "the data set", rows._fingerprint)
    if isinstance(rows, (str, bytes, Mapping)):
        raise DataError(f"expected a list of dictionaries, got {type(rows).__name__}")
    source = _from_json(list(read_objects(rows)), "the list")
    if not len(source):
        raise DataError("the list of rows is empty", hint="pass at least one row")
    return source


def load_source(
    path: str,
    *,
    name: str | None = None,
    split: str | None = None,
    cache_dir: str | None = None,
    skip_broken: bool = False,
) -> Source:
    """Return the rows of a file, folder, glob or hub data set.

    Args:
        path: `train.jsonl`, `folder/`, `data/*.parquet`, `HuggingFaceH4/ultrachat_200k`.
        name: The hub data set's configuration.
        split: `train`, `train_sft[:5000]`, `train[:1%]`, `train[:10]+train[-10:]`. Without one,
            `train` where there are several.
        cache_dir: Where Parquet and hub data are unpacked; the `datasets` cache by default.
        skip_broken: Leave out what cannot be read, and say so in `Source.broken`.

    Raises:
        DataError: nothing is there, it cannot be read, or it has no such split.
    """
    if Path(path).exists() or glob.has_magic(path):
        files = _choose_split(_find_files(path), split)
        source = _load_files(files, path, cache_dir)
        if source.broken and not skip_broken:
            raise source.broken[0].error()
        return _sliced(source, split) if split else source
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in SUFFIXES:
        raise DataError(
            f"there is no file or folder {path} (looked from {Path.cwd()})",
            hint="check the path; hub data sets are named owner/name",
        )
    return _load_hub(path, name, split, cache_dir)


def _find_files(path: str) -> list[Path]:
    place = Path(path)
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(
                f"the folder {path} has no data files", hint=f"known kinds: {', '.join(SUFFIXES)}"
            )
        return files
    if place.exists():
        return [place]
    files = sorted(Path(match) for match in glob.glob(path, recursive=True))
    if not files:
        raise DataError(f"no file matches {path}", hint=f"looked from {Path.cwd()}")
    return files


def _split_word(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.stem.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _choose_split(files: list[Path], split: str | None) -> list[Path]:
    """Keep the files of one split where names tell them apart; a lone file is any split."""
    kinds = [_split_word(file) for file in files]
    if len(set(kinds)) < 2:
        return files
    base = re.split(r"[\[+]", split)[0].strip() if split else "train"
    wanted = _SPLIT_WORDS.get(base.split("_")[0], base)
    chosen = [file for file, kind in zip(files, kinds, strict=True) if kind == wanted]
    if not chosen:
        raise DataError(
            f"no file belongs to the split {base!r}; by their names there are "
            f"{', '.join(sorted({kind or 'unnamed' for kind in kinds}))}",
            hint="set `split` to one of these, or name the file",
        )
    return chosen


def _load_files(files: list[Path], title: str, cache_dir: str | None) -> Source:
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    if parquet and len(parquet) < len(files):
        raise DataError(
            f"{title} mixes Parquet with other files", hint="name one kind, e.g. folder/*.parquet"
        )
    if not parquet:
        return _from_files(files, title)
    for file in parquet:
        check_regular(file)
        try:
            pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{file} is no readable Parquet file: {error}") from error
    try:
        rows = datasets.Dataset.from_parquet([str(f) for f in parquet], cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(f"{title} cannot be read: {error.__cause__ or error}") from error
    if not len(rows):
        raise DataError(f"{title} has no rows")
    digest = hashlib.sha256("".join(sha256(file) for file in parquet).encode()).hexdigest()
    return Source(rows, title, digest)


def _from_files(files: list[Path], title: str) -> Source:
    rows: list[Row] = []
    broken: list[Broken] = []
    firsts = []
    for file in files:
        first = len(rows)
        try:
            for row in read_file(file):
                rows.append(row) if isinstance(row, Row) else broken.append(row)
        except DataError as error:
            if len(files) == 1:
                raise
            broken.append(Broken.of(file.name, error))
        if len(rows) > first:
            firsts.append(first)
    return dataclasses.replace(_from_json(rows, title), broken=tuple(broken), firsts=tuple(firsts))


def _from_json(rows: list[Row], title: str) -> Source:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.json.encode() + b"\n")
    columns = {ROW: [row.json for row in rows], WHERE: [row.where for row in rows]}
    features = datasets.Features(
        {ROW: datasets.Value("large_string"), WHERE: datasets.Value("string")}
    )
    table = pyarrow.table(columns, schema=features.arrow_schema)
    dataset = datasets.Dataset(table, fingerprint=digest.hexdigest())
    return Source(dataset, title, digest.hexdigest())


def _sliced(source: Source, split: str) -> Source:
    """Return the rows that a split slice such as `train[:1%]` names."""
    names = {part.split("[")[0].strip() for part in split.split("+")}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(
            dict.fromkeys(names, len(source))
        )
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"the split {split!r} does not fit {source.title} with {len(source)} rows: {error}",
            hint="write it like train, train[:500] or train[10%:20%]",
        ) from error
    indices = [i for part in parts for i in range(*slice(part.from_, part.to).indices(len(source)))]
    if not indices:
        raise DataError(f"the split {split!r} of {source.title} has no rows")
    fingerprint = hashlib.sha256(f"{source.fingerprint} {split}".encode()).hexdigest()
    rows = source.rows.select(indices)
    return dataclasses.replace(source, rows=rows, fingerprint=fingerprint, firsts=(0,))


def _load_hub(path: str, name: str | None, split: str | None, cache_dir: str | None) -> Source:
    try:
        loaded = datasets.load_dataset(path, name, split=split, cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path!r} is no local file, and as a hub data set it cannot be loaded: {error}",
            hint="check the name, `name` and `split`; without network, give a local path",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) > 1:
            raise DataError(
                f"{path} has the splits {', '.join(loaded)}", hint="set `split` to one of them"
            )
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if not len(loaded):
        raise DataError(f"{path} has no rows in the split {split!r}")
    return Source(loaded, path, loaded._fingerprint)
