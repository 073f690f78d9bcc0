"""YAML is read strictly, and every key knows its line."""

import pytest

from halfbyte.config.text import parse_override, read_yaml
from halfbyte.errors import ConfigError


def test_keys_know_their_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("# a comment\nmodel: m\nlora:\n  r: 8\n")
    values, lines = read_yaml(path)
    assert values == {"model": "m", "lora": {"r": 8}}
    assert lines == {"model": 2, "lora": 3, "lora.r": 4}


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("-1E5", -1e5), ("1.5e3", 1500.0), ("12", 12), ("1e", "1e"), ("e5", "e5")],
)
def test_numbers_are_yaml_1_2(text, value):
    assert parse_override(f"key={text}") == ("key", value)


def test_overrides_are_yaml():
    assert parse_override("columns={prompt: q}") == ("columns", {"prompt": "q"})
    assert parse_override("path=a=b") == ("path", "a=b")
    assert parse_override("eval_path=") == ("eval_path", None)


def test_no_code_is_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "? [a, b]\n: 1\n"])
def test_keys_stand_once_and_are_names(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="stands here twice, or is no name"):
        read_yaml(path)


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: 2024-13-45\n",
        "a: !!int x\n",
        "a: !!bool x\n",
        "a: !!timestamp x\n",
        "a: " + "9" * 5000,
        "[" * 100_000,
        "a: \0",
        "a: 1\n---\nb: 2\n",
        "x" * (1 << 21),
    ],
)
def test_what_is_no_yaml_or_too_much_is_an_error(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_yaml(path)


@pytest.mark.parametrize("value", ["2024-13-45", "*a", "!!timestamp x", "[" * 100_000])
def test_the_command_line_is_read_as_strictly(value):
    with pytest.raises(ConfigError, match="the value of key"):
        parse_override(f"key={value}")


def test_a_byte_order_mark_is_no_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: m\n")
    assert read_yaml(path)[0] == {"model": "m"}
