"""The header of a safetensors file, with every length checked before anything is allocated.

A file is eight bytes of header length (little-endian), a JSON object that maps each tensor's name
to its dtype, shape and byte range, and the bytes themselves: in order, without holes, to the end.
"""

import collections
import json
import math
import reprlib
import stat
from pathlib import Path
from typing import Any, NamedTuple

import torch

from halfbyte.errors import CheckpointError

AGAIN = "the file is damaged or incomplete: copy it again from where it came"

_MAX_JSON_BYTES = 100_000_000
_MAX_NAME_LENGTH = 1000
_MAX_DIMS = 16
# In the order of safetensors, which sorts the tensors of a file by it, the last one first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


class TensorInfo(NamedTuple):
    """Where a tensor lies and what it is.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        file: The file that holds it.
        start: Its first byte, from the beginning of the file.
        num_bytes: How many bytes it has.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return what the safetensors file at `path` holds, in the order of its bytes.

    Raises:
        CheckpointError: the file is missing, truncated, or its header contradicts itself.
    """
    path = Path(path)
    file_bytes = regular_file_bytes(path)
    if file_bytes < 8:
        raise CheckpointError(f"{path} has {file_bytes} bytes, too few for safetensors", hint=AGAIN)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(_MAX_JSON_BYTES, file_bytes - 8):
            raise CheckpointError(
                f"{path} says that its header has {header_bytes} bytes, but the file has "
                f"{file_bytes} (a header may have {_MAX_JSON_BYTES})",
                hint=AGAIN,
            )
        header = parse_json(file.read(header_bytes), path)
    header.pop("__metadata__", None)
    first = 8 + header_bytes
    tensors = {name: _tensor_info(path, name, entry, first) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
    end = first
    for name, info in ordered.items():
        if info.start != end:
            raise CheckpointError(
                f"{path}: the bytes of {name!r} start at {info.start}, expected {end}", hint=AGAIN
            )
        end += info.num_bytes
    if end != file_bytes:
        raise CheckpointError(f"{path} has {file_bytes} bytes, expected {end}", hint=AGAIN)
    return ordered


def regular_file_bytes(path: Path) -> int:
    """Return the size of the file at `path`.

    Raises:
        CheckpointError: it is missing, or a directory, pipe or device.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint=AGAIN) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`.

    Raises:
        CheckpointError: it is missing, huge, not JSON, not an object, or has a key twice or NaN.
    """
    num_bytes = regular_file_bytes(path)
    if num_bytes > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {num_bytes} bytes, at most {_MAX_JSON_BYTES} are read")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, where: object) -> dict[str, Any]:
    """Return the JSON object in `text`.

    Raises:
        CheckpointError: it is none, has a key twice, or a number that is not finite; names `where`.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} holds no valid JSON: {error}", hint=AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: expected a JSON object, got {type(value).__name__}", hint=AGAIN
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, but not from pairs of which one would silently win."""
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {reprlib.repr(twice)} is there twice")
    return result


def _finite(text: str) -> float:
    """Read a number, but neither `NaN` and `Infinity`, which are no JSON, nor `1e999`."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _tensor_info(path: Path, name: str, entry: Any, first: int) -> TensorInfo:
    if len(name) > _MAX_NAME_LENGTH:
        raise CheckpointError(f"{path} has a tensor whose name has {len(name)} letters", hint=AGAIN)
    described = f"{path}: {name!r} is described by {reprlib.repr(entry)}"
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(described, hint=AGAIN) from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name!r} has the unknown dtype {reprlib.repr(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not _are_lengths(shape, start, end):
        raise CheckpointError(described, hint=AGAIN)
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != expected:
        raise CheckpointError(
            f"{path}: {name!r} has {end - start} bytes, its shape {shape} needs {expected}",
            hint=AGAIN,
        )
    return TensorInfo(tuple(shape), DTYPES[dtype], path, first + start, expected)


def _are_lengths(shape: list[Any], start: Any, end: Any) -> bool:
    """Whether these are whole numbers, with strides that fit 64 bits (also around a zero)."""
    if not all(type(length) is int and length >= 0 for length in (*shape, start, end)):
        return False
    return max(math.prod(max(length, 1) for length in shape), start, end) < 2**63
