"""What is exported: folders of models, and adapters merged on the way."""

import json

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from halfbyte.errors import AdapterError, CheckpointError, ConfigError
from halfbyte.export.config import MergeConfig
from halfbyte.export.merge import merge
from halfbyte.gguf.source import open_source
from halfbyte.quant.config import NF4Config

NF4 = MergeConfig(onto="dequantized", quant=NF4Config())


@pytest.fixture
def adapt(tmp_path):
    """Return a function that saves a random adapter on a base."""

    def adapt(base, **settings):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, **settings})
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return adapt


def test_a_models_folder_gives_its_tensors(make_model):
    folder = make_model("llama")
    source = open_source(folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = dict(source.tensors())
    assert found.keys() == state.keys() == source.shapes.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert source.choice is None
    assert not source.is_tied


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_an_adapter_is_merged_as_merge_does(make_model, adapt, tmp_path, onto):
    folder = adapt(make_model("llama"), target_modules=["q_proj", "down_proj"])
    config = MergeConfig(onto=onto, quant=NF4Config())
    source = open_source(folder, config)
    merge(folder, tmp_path / "merged", onto=onto, quant=NF4Config(), dtype="float32")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    found = dict(source.tensors())
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert source.choice.onto == onto


def test_the_base_alone_is_as_training_saw_it(make_model, adapt):
    base = make_model("llama")
    folder = adapt(base, target_modules=["q_proj"])
    seen = dict(open_source(folder, NF4, base_only=True).tensors())
    plain = dict(open_source(base).tensors())
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0.03 < (seen[name] - plain[name]).norm() / plain[name].norm() < 0.15
    assert torch.equal(seen["lm_head.weight"], plain["lm_head.weight"])


def test_a_tied_output_is_left_out_until_an_adapter_unties_it(make_model, adapt):
    base = make_model("qwen2")
    assert "lm_head.weight" not in open_source(base).shapes
    source = open_source(adapt(base, target_modules=["embed_tokens"]), NF4)
    assert "lm_head.weight" in source.shapes
    assert "lm_head.weight" in dict(source.tensors())
    assert not source.is_tied


def test_trained_copies_may_have_more_rows(make_model, adapt):
    base = make_model("llama")
    folder = adapt(base, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    source = open_source(folder, NF4)
    for name, tensor in source.tensors():
        assert tuple(tensor.shape) == source.shapes[name]


def test_what_cannot_be_exported_is_told(tmp_path, make_model, adapt):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="'gpt2' cannot be written"):
        open_source(tmp_path / "gpt2")
    folder = adapt(make_model("llama"), target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="got 'quantized'"):
        open_source(folder, MergeConfig(onto="quantized"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises((AdapterError, CheckpointError), match="gone"):
        open_source(folder, NF4)
