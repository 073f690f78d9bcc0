import json

import datasets
import pytest

from halfbyte.data.sources import decode, from_rows, load_source
from halfbyte.errors import DataError


def numbers(source):
    batch = source.rows[:]
    return [row["n"] for _, row in decode(batch, range(len(source)))]


@pytest.fixture
def hundred(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(100)))
    return str(path)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, range(100)),
        ("train", range(100)),
        ("train_sft[:50]", range(50)),
        ("train[:5000]", range(100)),
        ("train[:1%]", [0]),
        ("train[-2:]", [98, 99]),
        ("train[10%:12%]", [10, 11]),
        ("train[:2]+train[50:51]", [0, 1, 50]),
    ],
)
def test_splits_of_local_files(hundred, split, expected):
    assert numbers(load_source(hundred, split=split)) == list(expected)


@pytest.mark.parametrize("split", ["train[:", "train[5:5]", "[:5]"])
def test_splits_that_do_not_fit(hundred, split):
    with pytest.raises(DataError, match="split"):
        load_source(hundred, split=split)


def test_fingerprints_follow_the_content(hundred, tmp_path):
    whole = load_source(hundred).fingerprint
    assert load_source(hundred).fingerprint == whole
    assert load_source(hundred, split="train[:5]").fingerprint != whole
    copy = tmp_path / "copy.jsonl"
    copy.write_text((tmp_path / "data.jsonl").read_text())
    assert load_source(str(copy)).fingerprint == whole
    copy.write_text(copy.read_text().replace("99", "98"))
    assert load_source(str(copy)).fingerprint != whole


def test_folders_and_globs(tmp_path):
    for name, n in (("a.jsonl", 1), ("b.json", 2), ("sub/c.jsonl", 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"n": n}))
    (tmp_path / "README").write_text("not data")
    assert numbers(load_source(str(tmp_path))) == [1, 2, 3]
    assert numbers(load_source(str(tmp_path / "*.json*"))) == [1, 2]
    with pytest.raises(DataError, match="no file matches"):
        load_source(str(tmp_path / "*.csv"))


def test_a_folder_with_splits_never_mixes_them(tmp_path):
    for n, name in enumerate(("train-0.jsonl", "train-1.jsonl", "test.jsonl", "validation.jsonl")):
        (tmp_path / name).write_text(json.dumps({"n": n}))
    assert numbers(load_source(str(tmp_path))) == [0, 1]
    assert numbers(load_source(str(tmp_path), split="test")) == [2]
    assert numbers(load_source(str(tmp_path), split="validation[:1]")) == [3]
    (tmp_path / "train-0.jsonl").unlink()
    (tmp_path / "train-1.jsonl").unlink()
    with pytest.raises(DataError, match="there are test, validation"):
        load_source(str(tmp_path))


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    turns = [[{"role": "user", "x": 1}], [{"role": "user", "y": 2}]]
    datasets.Dataset.from_dict({"n": [1, 2], "turns": turns}).to_parquet(path)
    source = load_source(str(path), cache_dir=str(tmp_path / "cache"))
    assert numbers(source) == [1, 2]
    # What Arrow filled with null is gone again.
    assert source.first()["turns"] == [{"role": "user", "x": 1}]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="no readable Parquet"):
        load_source(str(tmp_path / "b.parquet"))
    (tmp_path / "c.jsonl").write_text("{}")
    with pytest.raises(DataError, match="mixes Parquet"):
        load_source(str(tmp_path))


def test_rows_in_memory():
    assert numbers(from_rows([{"n": 1}, {"n": 2}])) == [1, 2]
    assert numbers(from_rows(datasets.Dataset.from_dict({"n": [3]}))) == [3]
    for rows in ([], datasets.Dataset.from_dict({"n": []})):
        with pytest.raises(DataError, match=r"empty|no rows"):
            from_rows(rows)
    with pytest.raises(DataError, match="expected a list of dictionaries"):
        from_rows("train.jsonl")


def test_missing_places(tmp_path):
    for path in ("./gone.jsonl", "gone.jsonl", str(tmp_path / "gone")):
        with pytest.raises(DataError, match="there is no file or folder"):
            load_source(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no data files"):
        load_source(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach the Hub"),
        datasets.exceptions.DatasetNotFoundError("doesn't exist"),
        ValueError("Unknown split \"trian\". Should be one of ['train']."),
    ],
)
def test_hub_failures_are_one_message(monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match="no local file, and as a hub data set") as error:
        load_source("someone/something")
    assert str(failure) in error.value.message
    assert "local path" in error.value.hint


def test_hub_splits(monkeypatch):
    asked = {}
    one = datasets.Dataset.from_dict({"n": [1]})

    def load(path, name, *, split, cache_dir):
        asked.update(path=path, name=name, split=split)
        return found if split is None else one

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = datasets.DatasetDict({"train": one, "test": one})
    assert numbers(load_source("a/b", name="main", split="train_sft[:5000]")) == [1]
    assert asked == {"path": "a/b", "name": "main", "split": "train_sft[:5000]"}
    assert numbers(load_source("a/b")) == [1]
    found = datasets.DatasetDict({"one": one, "two": one})
    with pytest.raises(DataError, match="has the splits one, two"):
        load_source("a/b")
