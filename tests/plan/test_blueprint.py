"""A run's model from config.json alone has the tensors of the loaded one."""

import json

import peft
import pytest
import torch

import halfbyte as hb
from halfbyte.errors import CheckpointError
from halfbyte.plan.blueprint import blueprint


def shapes(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("double_quant", [True, False])
def test_it_has_the_tensors_of_the_loaded_model(tiny_base, double_quant):
    quant = hb.NF4Config(double_quant=double_quant)
    lora = hb.LoraConfig(r=4)
    model, _ = hb.load(tiny_base, quant=quant, device="cpu")
    planned = blueprint(tiny_base, quant=quant, lora=lora, dtype=model.dtype)
    assert all(t.is_meta for t in planned.parameters())
    expected = shapes(hb.add_lora(model, lora))
    found = shapes(planned)
    # Rotary frequencies and the like are made on the CPU even on the meta device: tiny either way.
    assert {k: v for k, v in found.items() if "rotary" not in k} == {
        k: v for k, v in expected.items() if "rotary" not in k
    }


def test_only_config_json_is_needed(llama_8b, llama_8b_model):
    assert [path.name for path in llama_8b.iterdir()] == ["config.json"]
    assert llama_8b_model.get_base_model().config.num_hidden_layers == 32


def test_what_is_quantized_on_disk_keeps_its_format(llama_8b, tmp_path):
    settings = json.loads((llama_8b / "config.json").read_text())
    settings["num_hidden_layers"] = 1
    settings["quantization_config"] = hb.NF4Config(block_size=128, double_quant=False).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = blueprint(tmp_path, quant=hb.NF4Config(), lora=peft.LoraConfig(r=4), dtype=None)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert layer.absmax.dtype == torch.float32
    assert layer.absmax.numel() == 4096 * 4096 // layer.block_size
    assert model.dtype == torch.bfloat16


def test_sixteen_bits_stay_sixteen(tiny_base):
    model = blueprint(tiny_base, quant=None, lora=hb.LoraConfig(r=4), dtype=torch.bfloat16)
    assert not any(p.dtype == torch.uint8 for p in model.parameters())


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 100000}')
    with pytest.raises(CheckpointError, match="100000"):
        blueprint(tmp_path, quant=None, lora=hb.LoraConfig(), dtype=None)
