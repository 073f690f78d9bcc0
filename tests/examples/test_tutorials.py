"""The two scripts that people learn QLoRA from run as they stand, on the embedded base."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.demo.base import base_path

EXAMPLES = Path(__file__).parents[2] / "examples"


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a script as Python does, in this process, and what it prints."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_sft_trainer_trains_saves_and_merges(run, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus one?"},
                {"role": "assistant", "content": f"{i + 1}"},
            ]
        }
        for i in range(24)
    ]
    data = _write(tmp_path / "chat.jsonl", rows)
    out = tmp_path / "out"
    run(
        "sft_trainer.py", "--model", base_path(), "--dataset", data, "--output", out,
        "--max-steps", 3, "--batch-size", 2, "--max-length", 128,
    )  # fmt: skip
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for key, value in adapter.items() if "lora_B" in key)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    base = AutoModelForCausalLM.from_pretrained(base_path(), dtype=merged.dtype)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(merged.state_dict()[name], base.state_dict()[name])
    assert "quantization_config" not in json.loads((out / "merged" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(out / "merged").chat_template


def test_trainer_saves_an_adapter_that_loads_on_the_4_bit_base_again(run, tmp_path):
    rows = [{"text": f"The number after {i} is {i + 1}."} for i in range(32)]
    data = _write(tmp_path / "text.jsonl", rows)
    out = tmp_path / "out"
    printed = run(
        "trainer.py", "--model", base_path(), "--dataset", data, "--output", out,
        "--max-steps", 2, "--max-length", 32,
    )  # fmt: skip
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert printed.strip().splitlines()[-1].startswith("The")
