"""Rows of all splits with what is known of them; nothing is refused here."""

import json

import pytest

from halfbyte.data.config import DataConfig
from halfbyte.data.gather import gather
from halfbyte.errors import DataError


def talk(n):
    turns = [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]
    return json.dumps({"messages": turns})


@pytest.fixture
def read(tokenizer, tmp_path):
    def call(path, **settings):
        settings = {"chat_template": "plain", "cache_dir": str(tmp_path / "cache"), **settings}
        return gather(DataConfig(path=str(path), **settings), tokenizer, seed=0, progress=False)

    return call


def test_broken_lines_are_kept_apart_from_rows(read, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{talk(1)}\n{{"messages": \n{talk(2)}\n{{"messages": 5}}\n')
    split = read(path).train
    assert split.num_read == 3
    assert len(split.rows) == 2
    assert [row.where for row in split.broken] == ["data.jsonl line 2", "data.jsonl line 4"]
    assert {row.file for row in split.broken} == {"data.jsonl"}


def test_a_folder_is_read_as_most_of_its_files_are(read, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    (folder / "b.jsonl").write_text(talk(1))
    (folder / "c.jsonl").write_text(talk(2))
    (folder / "d.jsonl").write_text("")
    (folder / "e.jsonl").write_text('{"neither": 1}')
    split = read(folder).train
    assert split.layout.format == "messages"
    assert len(split.rows) == 2
    assert [row.file for row in split.broken] == ["d.jsonl", "a.jsonl", "e.jsonl"]


def test_a_folder_without_any_known_format_is_an_error(read, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"neither": 1}')
    with pytest.raises(DataError, match="which are no known format"):
        read(path)
    path.write_text("[broken\n")
    with pytest.raises(DataError, match="broken JSON"):
        read(path)


def test_splits_share_no_row_and_no_fact(read, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(talk(n) + "\n" for n in range(20)))
    gathered = read(path, eval_fraction=0.25)
    train, held = gathered.splits["train"], gathered.splits["eval"]
    assert (train.num_read, held.num_read) == (15, 5)
    assert not set(train.facts.source) & set(held.facts.source)
    assert set(train.rows.source) == set(train.facts.source)
    assert gathered.stop == "</s>"
    assert read(path).splits.keys() == {"train"}
