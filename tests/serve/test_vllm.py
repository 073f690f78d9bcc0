"""vLLM's command names the files that are there, with the rank that they have."""

import json
from pathlib import Path

import peft
import pytest
from transformers import AutoModelForCausalLM

from halfbyte.errors import AdapterError
from halfbyte.serve.vllm import vllm_command


def value(command, option):
    return command[command.index(option) + 1]


def write(tiny_base, folder, **settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings})
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_paths_and_ranks_are_those_of_the_files(adapters, tiny_base, tmp_path):
    wide = write(tiny_base, tmp_path / "wide", r=40)
    command = vllm_command(
        str(tiny_base), {**adapters, "wide": wide}, served_model_name="base", max_model_len=512
    )
    assert command[:3] == ["vllm", "serve", str(tiny_base)]
    assert value(command, "--served-model-name") == "base"
    assert value(command, "--max-model-len") == "512"
    assert value(command, "--quantization") == "bitsandbytes"
    assert value(command, "--max-loras") == "4"
    modules = dict(word.split("=", 1) for word in command[command.index("--lora-modules") + 1 :])
    assert list(modules) == [*adapters, "wide"]
    ranks = []
    for folder in modules.values():
        assert Path(folder).is_absolute()
        assert (Path(folder) / "adapter_model.safetensors").is_file()
        ranks.append(json.loads((Path(folder) / "adapter_config.json").read_text())["r"])
    assert max(ranks) == 40
    assert value(command, "--max-lora-rank") == "64"
    assert value(vllm_command("x", adapters), "--max-lora-rank") == "8"


def test_a_base_alone_needs_nothing_more():
    assert vllm_command("Qwen/Qwen3-8B", {}) == ["vllm", "serve", "Qwen/Qwen3-8B"]


def test_what_training_did_is_told(tiny_base, tmp_path):
    folder = write(tiny_base, tmp_path / "sixteen")
    (folder / "halfbyte.json").write_text('{"quantization": null}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    command = vllm_command("x", {"a": folder})
    assert "--quantization" not in command
    assert value(command, "--chat-template") == str(folder / "chat_template.jinja")
    other = write(tiny_base, tmp_path / "other")
    assert value(vllm_command("x", {"a": folder, "b": other}), "--chat-template")
    (other / "chat_template.jinja").write_text("another")
    with pytest.raises(AdapterError, match="2 different chat templates"):
        vllm_command("x", {"a": folder, "b": other})


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"alpha_pattern": {"q_proj": 3}}], ids=str
)
def test_what_vllm_cannot_take_is_an_error(tiny_base, tmp_path, settings):
    folder = write(tiny_base, tmp_path / "odd", **settings)
    with pytest.raises(AdapterError, match="'odd': vLLM") as caught:
        vllm_command("x", {"odd": folder})
    assert "halfbyte merge" in caught.value.hint
