"""Headers that lie: the numbers are those of the fault list."""

import json
import os

import pytest
import torch

from halfbyte.checkpoint.header import read_header, read_json
from halfbyte.errors import CheckpointError


def entry(start, end, shape=None, dtype="U8"):
    return {
        "dtype": dtype,
        "shape": [end - start] if shape is None else shape,
        "data_offsets": [start, end],
    }


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file with the given header and bytes."""

    def make(header, data=b"", *, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        size = (len(text) if length is None else length).to_bytes(8, "little")
        path.write_bytes(size + text + data)
        return path

    return make


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_header(path)
    assert str(path) in caught.value.message


def test_describes_what_safetensors_wrote(single, tensors):
    header = read_header(single / "model.safetensors")
    assert {name: (info.shape, info.dtype) for name, info in header.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


def test_case_1_one_byte_short(single):
    path = single / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    refused(path, "expected")


def test_bytes_after_the_last_tensor(write):
    refused(write({"a": entry(0, 4)}, b"12345"), "expected")


@pytest.mark.parametrize("length", [2**63, 10**6, 100_000_001])
def test_case_2_a_header_longer_than_the_file(write, length):
    refused(write({"a": entry(0, 4)}, b"1234", length=length), "header")


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe{}", b"{", b"[]", b"[" * 200_000, b'{"a": NaN}', b'{"a": {"dtype": "U8"}}'],
    ids=["utf8", "cut", "list", "deep", "nan", "incomplete"],
)
def test_case_3_a_header_that_is_no_description(write, text):
    refused(write(text), "JSON|described")


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(0, 4), "b": entry(2, 6)},
        {"a": entry(0, 2), "b": entry(4, 6)},
        {"a": entry(1, 6)},
        {"a": entry(4, 0, shape=[4])},
        {"a": entry(0, 6, shape=[7])},
        {"a": entry(0, 6, shape=[-1, -6])},
        {"a": entry(0, 6, shape=[2**62, 2**62])},
        {"a": entry(0, 6, shape=[6.0])},
        {"a": entry(0, 6, shape="6")},
        {"a": entry(0, 6, shape=[True, 6])},
        {"a": entry(0, 6, dtype="F33")},
        {"a": entry(0, 6, dtype=["U8"])},
        {"a": entry(0, 2**64, shape=[2**64])},
        {"a": {"dtype": "U8", "shape": [6], "data_offsets": [0]}},
        {"a": 6},
    ],
)
def test_case_4_entries_that_contradict_each_other_or_the_file(write, entries):
    refused(write(entries, b"123456"), "bytes|described|dtype")


def test_case_5_a_name_that_is_there_twice(write):
    one = json.dumps(entry(0, 4))
    refused(write(f'{{"a": {one}, "a": {one}}}'.encode(), b"1234"), "'a' is there twice")


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_case_6_a_file_too_short_for_a_header(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, "too few")


def test_empty_tensors_take_no_bytes(write):
    header = read_header(write({"a": entry(0, 0, shape=[0, 3]), "b": entry(0, 4)}, b"1234"))
    assert header["a"].shape == (0, 3)
    assert header["b"].dtype == torch.uint8


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: None],
    ids=["pipe", "folder", "nothing"],
)
def test_what_is_no_file_is_not_opened(tmp_path, make):
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=r"regular file|cannot be read"):
        read_header(path)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": Infinity}', "[1]", "{", ""])
def test_case_22_json_that_is_ambiguous_or_none(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)
