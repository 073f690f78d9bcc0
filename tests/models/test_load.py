"""Loading for users: what works, and one clear message for what does not."""

import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from halfbyte.device import compute_dtype
from halfbyte.errors import CheckpointError, ConfigError, DeviceError, QuantizationError
from halfbyte.models.load import load
from halfbyte.quant.config import NF4Config
from halfbyte.quant.quantizer import nf4_layers

DOWN = "model.layers.1.mlp.down_proj.weight"


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def refused(folder, match, error=CheckpointError, **settings):
    with pytest.raises(error, match=match) as caught:
        load(folder, device="cpu", **settings)
    return caught.value


def test_loads_in_four_bits_by_default(base, tokens):
    model, tokenizer = load(base, device="cpu")
    assert len(nf4_layers(model)) == 14
    assert type(model.lm_head) is nn.Linear
    assert not model.training
    assert model.dtype == compute_dtype("cpu")
    assert tokenizer("hello").input_ids
    assert model.name_or_path == str(base)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=NF4Config(), dtype=model.dtype, device_map="cpu"
    )
    assert torch.equal(logits(model, tokens), logits(expected, tokens))


def test_quant_none_loads_sixteen_bits(base, tokens):
    model, _ = load(base, quant=None, device="cpu", dtype="bfloat16")
    expected = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert not nf4_layers(model)
    assert torch.equal(logits(model, tokens), logits(expected, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, "float16", "bfloat16"])
def test_dtype_is_that_of_what_is_not_quantized(base, dtype):
    model, _ = load(base, device="cpu", dtype=dtype)
    assert str(model.lm_head.weight.dtype).endswith(str(dtype).removeprefix("torch."))


def test_a_float32_checkpoint_stays_float32(base):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(base)
    assert load(base, device="cpu")[0].dtype == torch.float32


def test_no_progress_goes_to_what_is_no_terminal(tiny_base, capsys, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    load(tiny_base)
    assert "Loading weights" not in capsys.readouterr().err
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_loads_shards(base, tokens):
    expected = logits(load(base, device="cpu")[0], tokens)
    transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(
        base, max_shard_size="20KB"
    )
    (base / "model.safetensors").unlink()
    assert len(list(base.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(base, device="cpu")[0], tokens), expected)


@pytest.mark.parametrize("quant", [NF4Config(), NF4Config("fp4", double_quant=False)])
def test_what_it_saves_loads_again(base, tmp_path, tokens, quant):
    model, tokenizer = load(base, quant=quant, device="cpu", dtype="bfloat16")
    model.save_pretrained(tmp_path / "four")
    tokenizer.save_pretrained(tmp_path / "four")
    again, _ = load(tmp_path / "four", device="cpu", dtype="bfloat16")
    assert nf4_layers(again)[0][1].quant_type == quant.quant_type
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    dense, _ = load(tmp_path / "four", quant=None, device="cpu", dtype="bfloat16")
    assert not nf4_layers(dense)
    assert torch.equal(logits(dense, tokens), logits(model, tokens))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_loads_what_bitsandbytes_saved(make_base, tmp_path, tokens, storage):
    # bitsandbytes' CPU code is wrong where rows are no multiple of 64.
    base = make_base(intermediate_size=128)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=storage,
        ),
    )
    shutil.copytree(base, tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load(tmp_path / "theirs", device="cpu", dtype="bfloat16")
    # With gradients: without them bitsandbytes takes another product on CPUs, which rounds more.
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_an_adapter_goes_on_top(base, tmp_path, tokens):
    settings = {"device": "cpu", "dtype": "float32"}
    model, _ = load(base, **settings)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(model, config)
    expected = logits(tuned, tokens)
    tuned.save_pretrained(tmp_path / "adapter")
    for model, tokenizer in (
        load(base, adapter=tmp_path / "adapter", **settings),
        load(tmp_path / "adapter", **settings),
    ):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
        assert len(tokenizer) > 0


def test_other_settings_reach_transformers(base):
    model, _ = load(base, attn_implementation="eager", device_map={"": "cpu"}, max_memory=None)
    assert model.config._attn_implementation == "eager"
    assert model.device.type == "cpu"


def test_an_attention_that_is_not_installed(base):
    refused(base, "transformers cannot load", ConfigError, attn_implementation="flash_attention_9")


def test_a_device_that_is_none(base):
    with pytest.raises(DeviceError, match="expected a device"):
        load(base, device="gpu0")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere"])
def test_a_missing_folder(name):
    refused(name, "not there")


def test_a_hub_name_without_network():
    assert "network" in refused("nobody/nothing", "hub does not give it").hint


def test_a_folder_without_config(base):
    (base / "config.json").unlink()
    refused(base, r"no config\.json")


def test_a_folder_without_weights(base):
    (base / "model.safetensors").unlink()
    refused(base, "neither")


def test_a_folder_without_tokenizer(base):
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    refused(base, "tokenizer")


def test_case_1_a_truncated_file(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(base, "expected")


@pytest.mark.parametrize("quant", [NF4Config(), None])
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "lm_head.weight"])
def test_case_11_a_missing_tensor_is_an_error(base, change_tensors, name, quant):
    change_tensors(base, lambda tensors: tensors.pop(name))
    refused(base, f"lacks 1 of the model's 21 tensors, among them '{name}'", quant=quant)


@pytest.mark.parametrize("quant", [NF4Config(), None])
@pytest.mark.parametrize("name", [DOWN, "model.embed_tokens.weight"])
def test_case_13_a_misshapen_tensor_is_an_error(base, change_tensors, name, quant):
    def transpose(tensors):
        tensors[name] = tensors[name].T

    change_tensors(base, transpose)
    refused(base, f"expected '{name}' to be", quant=quant)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_case_8_a_weight_that_is_not_finite(base, change_tensors, bad):
    change_tensors(base, lambda tensors: tensors[DOWN].view(-1)[7:8].fill_(bad))
    refused(base, DOWN, QuantizationError)


def test_case_16_an_index_that_leads_elsewhere(base, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (base / "model.safetensors").rename(tmp_path / "elsewhere" / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere/model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(base, "leads out of the folder")


def test_case_19_only_pickled_weights(base):
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    refused(base, "pickle")


def test_case_20_a_model_that_brings_code(base, change_config):
    change_config(base, model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    (base / "modeling.py").write_text(f"open({str(base / 'sentinel')!r}, 'w')")
    refused(base, "never run")
    assert not (base / "sentinel").exists()


def test_case_20_code_beside_a_known_model_is_not_run(base, change_config, tokens):
    change_config(base, auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    (base / "modeling.py").write_text(f"open({str(base / 'sentinel')!r}, 'w')")
    model, _ = load(base, device="cpu")
    assert type(model) is transformers.LlamaForCausalLM
    assert not (base / "sentinel").exists()


def test_a_config_that_names_other_weights(base, change_config):
    change_config(base, transformers_weights="adapter_model.bin")
    refused(base, "transformers_weights")


def test_a_config_that_asks_for_code_of_the_hub(base, change_config):
    change_config(base, attn_implementation="someone/attention")
    refused(base, "someone/attention")


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": 2**40},
        {"hidden_size": -64},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "many"},
        {"num_attention_heads": 7},
        {"num_attention_heads": 0},
        {"vocab_size": 0},
        {"vocab_size": 10**9},
        {"hidden_act": "evil"},
        {"model_type": "nothing"},
        {"model_type": None},
        {"pad_token_id": 10**9},
        {"dtype": []},
    ],
)
def test_case_21_a_config_that_makes_no_sense(base, change_config, settings):
    (base / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | settings)
    )
    refused(base, r"config\.json")


@pytest.mark.parametrize("text", ["[1]", "null", "{", '{"watermarking_config": 5}'])
def test_case_21_generation_settings_that_make_no_sense(base, text):
    (base / "generation_config.json").write_text(text)
    refused(base, r"generation_config\.json")


def test_an_adapter_that_does_not_name_its_base(base, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(folder, "does not say what its base model is")


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"model_type": "llama", "model_type": "gpt2"}'])
def test_case_22_a_config_that_is_ambiguous(base, text):
    (base / "config.json").write_text(text)
    refused(base, r"config\.json")


def test_case_23_twins_that_differ_are_both_kept(base, change_config, tokens):
    expected = logits(load(base, device="cpu")[0], tokens)
    change_config(base, tie_word_embeddings=True)
    assert torch.equal(logits(load(base, device="cpu")[0], tokens), expected)


def test_case_24_other_dtypes_are_cast(base, change_tensors):
    def mix(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()

    change_tensors(base, mix)
    model, _ = load(base, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}


def test_case_36_a_config_that_forgets_the_quantization(base, change_config):
    load(base, device="cpu")[0].save_pretrained(base)
    change_config(base, quantization_config=None)
    refused(base, "does not say that")


def test_case_36_a_config_that_promises_quantization(base, change_config):
    change_config(base, quantization_config=NF4Config().to_dict())
    refused(base, "says that the weights are in 4 bits, and 0 weights are")


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq"}, {"load_in_8bit": True}, "nf4"])
def test_other_quantizations_are_refused(base, change_config, quantization):
    change_config(base, quantization_config=quantization)
    refused(base, "quantiz")
