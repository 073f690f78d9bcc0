import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data import files
from halfbyte.data.files import Broken, read_file, read_objects
from halfbyte.errors import DataError


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path):
    found = list(read_file(path))
    for row in found:
        if isinstance(row, Broken):
            raise row.error()
    return [json.loads(row.json) for row in found]


TWO = [{"text": "a"}, {"text": "b\u2019"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b\u2019"}\n'),
        ("no_newline.jsonl", '{"text": "a"}\n{"text": "b\u2019"}'),
        ("crlf.jsonl", '{"text": "a"}\r\n\r\n{"text": "b\u2019"}\r\n'),
        ("bom.jsonl", b"\xef\xbb\xbf" + '{"text": "a"}\n{"text": "b\u2019"}\n'.encode()),
        ("lines.json", '{"text": "a"}\n{"text": "b\\u2019"}\n'),
        ("array.json", '\n[{"text": "a"},\n {"text": "b\u2019"}]'),
        ("array_bom.json", b"\xef\xbb\xbf" + '[{"text": "a"}, {"text": "b\u2019"}]'.encode()),
        ("a.csv", "text\na\nb\u2019\n"),
        ("a.tsv", "text\r\na\r\nb\u2019\r\n"),
        ("a.txt", "a\n\n  \nb\u2019\n"),
    ],
)
def test_every_spelling_of_two_rows_is_read(tmp_path, name, content):
    assert rows(write(tmp_path, name, content)) == TWO


def test_rows_say_where_they_are(tmp_path):
    path = write(tmp_path, "a.jsonl", '\n{"x": 1}\n\n{"x": 2}\n')
    assert [row.where for row in read_file(path)] == ["a.jsonl line 2", "a.jsonl line 4"]


def test_nested_objects_keep_the_keys_that_they_have(tmp_path):
    lines = [{"a": {"x": None}}, {"a": {"y": [1, "2", {}]}}, {"a": "text"}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert rows(path) == lines


def test_csv_values_stay_text_and_may_hold_line_breaks(tmp_path):
    path = write(tmp_path, "a.csv", 'n,t\n007,"a, ""b""\nc"\n')
    assert rows(path) == [{"n": "007", "t": 'a, "b"\nc'}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n \r\n\n", "only blank lines"),
        ("a.csv", "a,b\n", "only blank lines"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: byte 0xff at position 8 is not UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), "line 1: byte 0xff"),
        ("a.jsonl", '{"a": 1}\n{"a": 1\n', "a.jsonl line 2: broken JSON at column 8"),
        ("a.jsonl", '{"a": 1}\n5\n', "a.jsonl line 2: expected a JSON object"),
        ("a.json", '[{"a": 1},\n{"a" 1}]', "a.json: broken JSON at line 2"),
        ("a.json", '[{"a": 1}, 3]', "a.json row 2: expected a JSON object"),
        ("a.json", '{\n"a": 1\n}', "a.json line 1: broken JSON"),
        ("a.jsonl", "[" * 200_000, "cannot be read"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1: this JSON cannot be read"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3: expected 2 columns as in the header, got more"),
        ("a.csv", "a,b\n1\n", "line 2: expected 2 columns as in the header, got fewer"),
        ("a.csv", 'a\n"1\n', "a.csv line"),
        ("a.zip", "PK", "expected a file that ends in .jsonl"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        rows(path)
    assert message in str(error.value)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, message in (
        (tmp_path / "pipe.jsonl", "no regular file"),
        (tmp_path, "is a directory"),
        (tmp_path / "gone.jsonl", "there is no file"),
    ):
        with pytest.raises(DataError, match=message):
            rows(path)


def test_unreadable_files_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", "{}")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        rows(path)


def test_an_endless_line_is_refused_with_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": "' + "x" * 200 + '"}')
    with pytest.raises(DataError, match="line 2 is longer than"):
        rows(path)


def test_rows_in_memory():
    assert [json.loads(row.json) for row in read_objects(TWO)] == TWO
    with pytest.raises(DataError, match="row 2: expected a JSON object"):
        list(read_objects([{}, "text"]))
    with pytest.raises(DataError, match="row 1 holds something"):
        list(read_objects([{"a": object()}]))


JSON_PIECES = st.sampled_from(
    [
        *(b'{"a": 1}', b"[", b"]", b"{", b"}", b'"', b"\n", b"\r\n", b",", b":", b"\x00", b"\xff"),
        *(
            b"\xef\xbb\xbf",
            b"1e999",
            b"NaN",
            b'"\\ud800"',
            b'{"a": "b", "a": "c"}',
            b"\xe2\x80\xa8",
        ),
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.one_of(st.binary(max_size=200), st.lists(JSON_PIECES, max_size=20).map(b"".join)),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]),
)
def test_any_bytes_are_rows_or_errors(tmp_path, content, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    try:
        found = list(read_file(path))
    except DataError:
        return
    for row in found:
        assert row.where.startswith(path.name)
        if isinstance(row, Broken):
            assert row.message
            assert row.file == path.name
        else:
            assert isinstance(json.loads(row.json), dict)


def test_a_file_of_another_kind_is_given_up_early(tmp_path):
    path = write(tmp_path, "a.jsonl", "no JSON\n" * 5000)
    found = list(read_file(path))
    assert len(found) == files.MAX_BROKEN_ROWS + 2
    assert "rest of the file was left out" in found[-1].message


def test_keys_that_stand_twice_and_long_lines_are_broken_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 30)
    path = write(tmp_path, "a.jsonl", '{"a": 1, "a": 2}\n{"a": "' + "x" * 99 + '"}\n{"a": 3}\n')
    first, second, third = read_file(path)
    assert "the key 'a' stands in one object twice" in first.message
    assert second.message.startswith("a.jsonl line 2 is longer than")
    assert third.where == "a.jsonl line 3"
