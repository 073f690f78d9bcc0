"""A run's parts fit together: steps, strategies and what is due when."""

import json
import shutil

import pytest

from halfbyte.errors import ConfigError
from halfbyte.train.config import TrainConfig
from halfbyte.train.evaluate import evaluate
from halfbyte.train.loop import train
from halfbyte.train.run import assemble


@pytest.fixture
def assembled(make_lora, tokenizer, rows_of, tmp_path):
    def make(**settings):
        config = TrainConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, num_train_epochs=4, **settings
        )
        return assemble(make_lora(), tokenizer, rows_of([5] * 9), None, config)

    return make


def due(run, strategy, every):
    return [step for step in range(1, run.total_steps + 1) if run.is_due(strategy, every, step)]


@pytest.mark.parametrize(
    ("strategy", "every", "steps"),
    [
        ("no", 1, []),
        ("epoch", 3, [5, 10, 15, 20]),
        ("steps", 8, [8, 16]),
        ("steps", 0.25, [5, 10, 15, 20]),
        ("steps", None, []),
    ],
)
def test_what_is_due_when(assembled, strategy, every, steps):
    run = assembled()
    assert run.total_steps == 20
    assert due(run, strategy, every) == steps


@pytest.mark.parametrize(
    ("optim", "bits", "placement"),
    [
        ("adamw_torch", 32, "device"),
        ("paged_adamw_32bit", 32, "auto"),
        ("paged_adamw_8bit", 8, "auto"),
    ],
)
def test_optimizer_is_the_one_that_was_named(assembled, optim, bits, placement):
    optimizer = assembled(optim=optim).optimizer
    assert (optimizer.state_bits, optimizer.placement) == (bits, placement)
    assert optimizer.num_parameters == 8192


def test_frozen_adapters_cannot_be_trained(make_lora, tokenizer, rows_of, tmp_path):
    model = make_lora().requires_grad_(False)
    with pytest.raises(ConfigError, match="at least one parameter that requires a gradient"):
        assemble(model, tokenizer, rows_of([5]), None, TrainConfig(output_dir=str(tmp_path)))


def test_a_run_in_eight_bits_says_so_resumes_and_is_evaluated_in_sixteen(
    make_lora, tokenizer, rows_of, tmp_path, fp8_anywhere
):
    rows, held_out, told = rows_of([9, 5, 7, 12] * 2), rows_of([6, 8], seed=1), []

    def run(name, **settings):
        config = TrainConfig(
            **{
                "output_dir": str(tmp_path / name), "max_steps": 3, "save_steps": 2,
                "per_device_train_batch_size": 4, "compute": "fp8", "disable_tqdm": True,
                **settings,
            }
        )  # fmt: skip
        model = make_lora(lora_dropout=0.1)
        result = train(model, tokenizer, rows, config, eval_data=held_out, listeners=[told.append])
        adapter = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        return adapter, result, model

    whole, result, model = run("whole")
    notices = [event.message for event in told if hasattr(event, "message")]
    assert sum("not QLoRA" in notice for notice in notices) == 1
    assert result.eval_loss == evaluate(model, tokenizer, held_out).loss
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["settings"]["compute"] == "fp8"
    assert "eight bits" in (tmp_path / "whole" / "README.md").read_text()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    with pytest.raises(ConfigError, match=r"settings\.compute was 'fp8', is 'bf16'"):
        run("cut", compute="bf16", resume_from_checkpoint="auto")
    assert run("cut", resume_from_checkpoint="auto")[0] == whole
    assert run("exact", compute="bf16")[0] != whole
