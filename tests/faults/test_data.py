"""Cases about rows and templates that no other test has."""

import gzip
import time

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import prepare
from halfbyte.errors import DataError, HalfbyteError
from halfbyte.train.config import TrainConfig
from halfbyte.train.loop import train

ROW = {"prompt": "2+2?", "completion": "4"}


@pytest.fixture
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def run(tiny_base, tokenizer, tmp_path):
    """Return a function that trains one step on what it is given."""

    def call(data, **changes):
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        settings = {"output_dir": str(tmp_path / "out"), "disable_tqdm": True, "max_steps": 1}
        return train(model, tokenizer, data, TrainConfig(**(settings | changes)))

    return call


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_case_037_a_template_that_fails_or_loops_or_fills_the_memory(tokenizer, tmp_path, template):
    config = DataConfig(chat_template=template + " {{ messages }}", cache_dir=str(tmp_path))
    started = time.monotonic()
    with pytest.raises(HalfbyteError):
        prepare(config, tokenizer, seed=0, rows=[ROW], progress=False)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ ''|attr('__class__') }}",
        "{{ messages|map(attribute='__class__')|list }}",
        "{{ '%s'.format.__globals__ }}",
    ],
)
def test_case_038_a_template_that_reaches_for_python(tokenizer, tmp_path, template):
    config = DataConfig(chat_template=template + " {{ messages }}", cache_dir=str(tmp_path))
    with pytest.raises(HalfbyteError):
        prepare(config, tokenizer, seed=0, rows=[ROW], progress=False)


@pytest.mark.parametrize(
    ("bad", "column"), [(260, "input_ids"), (-1, "input_ids"), (260, "labels")]
)
def test_case_055_a_token_that_the_model_does_not_have(run, bad, column):
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}
    rows = {name: [list(row[name]), [*row[name][:3], bad if name == column else 4]] for name in row}
    with pytest.raises(DataError, match=rf"token {bad}.*260 embeddings"):
        run(Dataset.from_dict(rows))


def test_case_054_a_row_longer_than_the_models_positions(run):
    row = [5] * 257
    with pytest.raises(DataError, match=r"257 tokens.*256 positions"):
        run(Dataset.from_dict({"input_ids": [row], "labels": [row]}))


@pytest.mark.parametrize("rows", [[ROW], [ROW] * 3])
def test_case_056_one_row_and_equal_rows_train(run, rows):
    result = run(rows, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert result.steps == 1


def test_case_052_a_micro_batch_without_supervised_tokens(run):
    rows = [[5, 6, 7], [8, 9, 10]]
    labels = [[-100, -100, -100], [-100, 9, 10]]
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})
    result = run(data, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert torch.isfinite(torch.tensor(result.loss))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.zip", "rows.tar"])
def test_case_058_archives_are_not_unpacked(tokenizer, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(bytes(10_000_000)))
    config = DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="unpack archives first"):
        prepare(config, tokenizer, seed=0, progress=False)
