"""Data in any of its forms becomes the same tokenized rows."""

import json

import pytest
from datasets import Dataset

from halfbyte.data.config import DataConfig
from halfbyte.train.inputs import fingerprint, pad_token_id, prepare_inputs

ROWS = [{"text": f"row number {i}"} for i in range(6)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_all_forms_give_the_same_rows(path, tokenizer):
    forms = [str(path), path, DataConfig(path=str(path)), ROWS, Dataset.from_list(ROWS)]
    inputs = [prepare_inputs(form, None, tokenizer, seed=0) for form in forms]
    assert len({tuple(map(tuple, one.train["input_ids"])) for one in inputs}) == 1
    assert len({one.fingerprint for one in inputs}) == 1


@pytest.mark.parametrize("as_path", [True, False])
def test_held_out_rows_are_read_as_the_training_rows_are(path, tokenizer, tmp_path, as_path):
    rows = [{"frage": "a?", "antwort": "b"}]
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(rows[0]))
    columns = {"prompt": "frage", "completion": "antwort"}
    train_path = tmp_path / "train.jsonl"
    train_path.write_text(
        "\n".join(json.dumps({"frage": f"{i}?", "antwort": "c"}) for i in range(3))
    )
    config = DataConfig(path=str(train_path), columns=columns, chat_template="plain")
    inputs = prepare_inputs(config, str(held) if as_path else rows, tokenizer, seed=0)
    assert (len(inputs.train), len(inputs.eval)) == (3, 1)


def test_tokenized_rows_are_taken_as_they_are(rows_of, tokenizer):
    rows = rows_of([5, 7])
    inputs = prepare_inputs(rows, rows, tokenizer, seed=0)
    assert inputs.train is rows
    assert inputs.eval is rows
    assert not inputs.packing


def test_fingerprint_depends_on_content_and_order_only():
    def rows(ids):
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    same = [rows([[1, 2], [3]]), rows([[9], [1, 2], [3]]).select([1, 2])]
    others = [rows([[1], [2, 3]]), rows([[3], [1, 2]]), rows([[1, 2], [4]])]
    assert len({fingerprint(one) for one in same}) == 1
    assert len({fingerprint(one) for one in [same[0], *others]}) == 4


def test_padding_needs_no_token_of_its_own(tokenizer):
    assert pad_token_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0
