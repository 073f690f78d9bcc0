"""What a finished run leaves at its root, and how it is read again."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from halfbyte.train.config import TrainConfig
from halfbyte.train.directory import write_json
from halfbyte.train.events import TrainResult
from halfbyte.train.inputs import Inputs
from halfbyte.train.result import (
    describe_run,
    finished_result,
    write_generation_config,
    write_result,
    write_tokenizer,
)


@pytest.fixture
def finished(make_lora, tokenizer, rows_of, tmp_path):
    model, inputs = make_lora(), Inputs(rows_of([5]), None, "f")
    result = TrainResult(4, 1.5, None, 2.0, 100, 50.0, 1 << 20, tmp_path)
    description = describe_run(model, inputs, TrainConfig(), {"total_steps": 4})
    write_result(model, tokenizer, inputs, description, result)
    return result


def test_result_is_read_back_for_the_same_run_only(finished, tmp_path):
    assert finished_result(tmp_path, {"total_steps": 4}) == finished
    assert finished_result(tmp_path, {"total_steps": 5}) is None


def test_moved_directory_is_where_it_is(finished, tmp_path):
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert finished_result(moved, {"total_steps": 4}).output_dir == moved
    moved.rename(tmp_path)


def test_unfinished_run_has_no_result(tmp_path):
    assert finished_result(tmp_path, {}) is None
    write_json(tmp_path / "run.json", {"status": "running", "identity": {}})
    assert finished_result(tmp_path, {}) is None
    (tmp_path / "run.json").write_text("{half")
    assert finished_result(tmp_path, {}) is None


def test_run_says_what_it_was_made_with(finished, tmp_path):
    run = json.loads((tmp_path / "run.json").read_text())
    assert {"halfbyte", "torch", "transformers", "peft", "python"} <= run["versions"].keys()
    assert run["settings"]["learning_rate"] == 2e-4
    assert run["quantization"] is None
    assert run["data"]["fingerprint"] == "f"


def test_tokenizer_has_the_template_it_was_trained_with(tokenizer, tmp_path):
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    write_tokenizer(tokenizer, tmp_path, chat_template=template)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert saved.apply_chat_template(messages, tokenize=False) == "[hi]"
    assert tokenizer.chat_template is None
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_generation_stops_where_training_did(make_lora, tokenizer, tmp_path):
    model = make_lora()
    model.get_base_model().generation_config.eos_token_id = 5
    write_generation_config(model, (7, 5), tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == [7, 5]
    (tmp_path / "generation_config.json").unlink()
    write_generation_config(model, (), tmp_path)  # the data came tokenized, nobody knows
    assert not (tmp_path / "generation_config.json").exists()


def test_a_finished_run_has_a_card(finished, tmp_path):
    assert "LoRA (rank" in (tmp_path / "README.md").read_text()
