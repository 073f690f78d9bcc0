"""halfbyte audit: from the tokenizer alone, to the terminal, to JSON, to a page."""

import json

import pytest

COLUMNS = "columns={prompt: question, completion: answer}"


@pytest.fixture
def cache(tmp_path):
    return f"cache_dir={tmp_path / 'cache'}"


@pytest.fixture
def tokenizer_only(tiny_base, tmp_path):
    """A model's folder without its weights."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in tiny_base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"question": "0?", "answer": "#### 0"}\n')
    return path


def test_a_run_is_audited_without_weights(run, config, tokenizer_only, held_out, cache):
    result = run("audit", config, f"model={tokenizer_only}", f"eval_path={held_out}", cache)
    assert result.exit_code == 0, result.output
    for said in ("learned tokens", "duplicates: 12 of 16 rows", "eval_overlap: 1 of 1 held-out"):
        assert said in result.output
    assert "nothing that ruins a model" in result.output


def test_data_are_audited_with_a_model(run, data, tokenizer_only, cache):
    result = run("audit", data, COLUMNS, cache, "--model", tokenizer_only, "--show", "1")
    assert result.exit_code == 0, result.output
    assert "train: data.jsonl line 1" in result.output
    assert "####" in result.output.replace("|", "")
    result = run("audit", data)
    assert result.exit_code == 2
    assert "add --model" in result.output


def test_json_is_all_that_is_printed(run, config, cache):
    result = run("audit", config, cache, "--json")
    report = json.loads(result.stdout)
    assert report["splits"]["train"]["rows"] == 16
    assert {finding["name"] for finding in report["findings"]} == {"duplicates"}


def test_a_page_is_written(run, config, tmp_path, cache):
    result = run("audit", config, cache, "--html", tmp_path / "a.html", "--show", "2")
    assert result.exit_code == 0
    text = (tmp_path / "a.html").read_text()
    assert text.startswith("<!doctype html>")
    assert text.count("<h3>data.jsonl line") == 2
    assert run("audit", config, cache, "--html", tmp_path / "gone" / "a.html").exit_code == 2


def test_what_train_would_refuse_exits_with_1(run, config, cache):
    result = run("audit", config, cache, "max_length=8")
    assert result.exit_code == 1
    assert "over_length" in result.output
    assert run("train", config, cache, "max_length=8").exit_code == 2


def talk(question, answer="ok"):
    return json.dumps(
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
    )


# File: (its bytes, what is said of it); nothing is said of sound ones.
BROKEN = {
    "array.json": (b'[1, {"messages": 3}]', "array.json row 1: expected a JSON object"),
    "bom.jsonl": (b"\xef\xbb\xbf" + talk("bom").encode(), None),
    "columns.jsonl": (b'{"a": "x"}\n{"a": "y"}\n', "the column 'messages' is missing"),
    "crlf.jsonl": (f"{talk('crlf')}\r\n{talk('crlf 2')}\r\n".encode(), None),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl: this JSON cannot be read"),
    "duplicate.jsonl": (
        b'{"messages": [], "messages": []}\n',
        "duplicate.jsonl line 1: this JSON cannot be read: the key 'messages' stands in one object",
    ),
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "good.jsonl": ("\n".join(talk(f"question {n} {n * 77}") for n in range(30)).encode(), None),
    "huge.jsonl": (b'"' + b"x" * (65 << 20) + b'"\n' + talk("huge").encode(), "longer than 64 MiB"),
    "latin1.jsonl": (
        f"{talk('a b c')}\n".encode() + b'"caf\xe9"\n',
        "latin1.jsonl line 2: byte 0xe9",
    ),
    "mixed.csv": (b"instruction,output\nhello,you\n", "mixed.csv line 2: the column 'messages'"),
    "nul.jsonl": (b'{"messages": "\x00"}\n', "nul.jsonl line 1: broken JSON at column 15"),
    "nul_text.jsonl": (talk("a\x00b").encode(), "nul_text.jsonl line 1: a\\x00b"),
    "roles.jsonl": (
        b'{"messages": [{"role": "narrator", "content": "x"}]}',
        "roles.jsonl line 1, turn 1: unknown role 'narrator'",
    ),
    "surrogate.jsonl": (talk("\ud800").encode(), "surrogate.jsonl line 1: the text holds half"),
    "truncated.jsonl": (
        f"{talk('t')}\n{talk('u')[:40]}".encode(),
        "truncated.jsonl line 2: broken",
    ),
    "utf16.jsonl": (talk("x").encode("utf-16"), "utf16.jsonl line 1: byte 0xff"),
}


def test_a_folder_of_broken_files_is_audited_in_one_go(run, tmp_path, tokenizer_only, cache):
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, (content, _) in BROKEN.items():
        (folder / name).write_bytes(content)
    result = run("audit", folder, cache, "--model", tokenizer_only, "--json")
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    examples = [
        line for finding in json.loads(result.stdout)["findings"] for line in finding["examples"]
    ]
    for name, (_, said) in BROKEN.items():
        about = [line for line in examples if name in line]
        assert bool(about) == (said is not None), (name, about)
        assert said is None or any(said in line for line in about), (name, about)
    allowed = run("audit", folder, cache, "--model", tokenizer_only, "allow=[unreadable_rows]")
    assert allowed.exit_code == 0
    assert "allowed  unreadable_rows" in allowed.output
