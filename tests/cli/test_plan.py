"""halfbyte plan: from config.json alone, for people and for programs."""

import json

import pytest
from transformers import LlamaConfig


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=32000, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def test_every_byte_has_an_owner_and_the_table_is_there(run, model):
    result = run("plan", model, "--card", "rtx4090", "r=8", "max_length=2048")
    assert result.exit_code == 0, result.output
    for part in ("4-bit codes", "adapters", "gradients", "optimizer", "peak", "fits", "141 GB"):
        assert part in result.stdout


def test_json_is_one_object_whose_owners_add_up(run, model):
    result = run("plan", model, "--vram", "24GiB", "--json", "--gpus", "2")
    record = json.loads(result.stdout)
    assert sum(record["owners"].values()) == record["peak_bytes"]
    assert record["fits"] is True
    assert record["gpus"] == 2
    assert record["most_tokens_by_card_gb"]["24"] > 10_000


def test_eight_bits_are_planned(run, model):
    result = run("plan", model, "--vram", "24GiB", "compute=fp8")
    assert "compute fp8" in result.stdout
    assert "scales of rows in eight bits" in result.stdout


def test_what_does_not_fit_is_exit_code_1_with_what_would(run, model):
    result = run("plan", model, "--vram", "1GiB", "max_length=65536")
    assert result.exit_code == 1
    assert "DOES NOT FIT" in result.stdout
    assert "would fit: " in result.stdout


def test_a_run_file_is_planned_as_it_would_train(run, config):
    result = run("plan", config, "--vram", "8GiB", "--json")
    record = json.loads(result.stdout)
    assert record["setting"]["rows"] >= 8
    assert record["setting"]["length"] == 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vram", "much"), "expected a size"),
        (("--card", "rtx9999"), "unknown card"),
        (("--card", "t4", "--vram", "8"), "keep one"),
        (("max_lenght=9",), "max_length"),
        (("compute=fp8", "dtype=float32"), "bfloat16"),
        (("compute=fp8", "use_dora=true"), "runs fused"),
    ],
)
def test_mistakes_are_told(run, model, arguments, message):
    result = run("plan", model, *arguments)
    assert result.exit_code == 2
    assert message in result.output + result.stderr
