"""An adapter's GGUF file holds pairs whose product is peft's update."""

import gguf
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.errors import AdapterError, CheckpointError, ConfigError
from halfbyte.gguf.adapter import export_adapter


@pytest.fixture
def adapt(tmp_path):
    """Return a function that saves a random adapter on a base, and the peft model."""

    def adapt(base, **settings):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base)
        own = {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "down_proj"], **settings}
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **own))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", adapted

    return adapt


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_llama_cpps_formula_gives_pefts_update(make_model, adapt, tmp_path, settings):
    folder, adapted = adapt(make_model("llama"), **settings)
    result = export_adapter(folder, tmp_path / "a.gguf", "f32")
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama"
    assert result.tensors == {"F32": 8}
    for layer in (0, 1):
        for there, module in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
            a, b = (tensors[f"blk.{layer}.{there}.weight.lora_{part}"] for part in "ab")
            assert a.shape[0] == b.shape[1]
            found = fields["adapter.lora.alpha"] / b.shape[1] * b @ a
            part = adapted.get_submodule(f"base_model.model.model.layers.{layer}.{module}")
            torch.testing.assert_close(found, part.get_delta_weight("default"))


def test_rows_of_b_follow_those_of_the_base(make_model, adapt, tmp_path):
    folder, adapted = adapt(make_model("llama"), target_modules=["q_proj"])
    export_adapter(folder, tmp_path / "a.gguf", "f32")
    _, tensors = read(tmp_path / "a.gguf")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    lora_B = layer.lora_B["default"].weight.data
    found = tensors["blk.0.attn_q.weight.lora_b"]
    torch.testing.assert_close(found[:4], lora_B[[0, 8, 1, 9]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "by DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight by Replace"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "cannot put an adapter on model.embed"),
    ],
)
def test_what_llama_cpp_cannot_add_is_said(make_model, adapt, tmp_path, settings, message):
    folder, _ = adapt(make_model("llama"), **settings)
    with pytest.raises(AdapterError, match=message) as caught:
        export_adapter(folder, tmp_path / "a.gguf")
    assert "merged" in caught.value.hint
    assert not (tmp_path / "a.gguf").exists()


def test_wrong_arguments(make_model, adapt, tmp_path):
    folder, _ = adapt(make_model("llama"))
    with pytest.raises(ConfigError, match="f32, f16, bf16: 'q8_0'"):
        export_adapter(folder, tmp_path / "a.gguf", "q8_0")
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        export_adapter(folder, tmp_path / "a.gguf")
