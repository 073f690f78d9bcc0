"""The quantizer inside transformers, with bitsandbytes beside it as the oracle."""

import copy
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import nn

from halfbyte.errors import CheckpointError, ConfigError, QuantizationError
from halfbyte.quant.config import NF4Config
from halfbyte.quant.linear import NF4Linear
from halfbyte.quant.quantizer import nf4_layers


def from_pretrained(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)


def load_bitsandbytes(folder, **settings):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **settings,
    )
    return from_pretrained(folder, quantization_config=config)


def test_quantizes_the_layers_that_bitsandbytes_quantizes(make_model, family):
    ours = from_pretrained(make_model(family), quantization_config=NF4Config())
    theirs = load_bitsandbytes(make_model(family))
    expected = [n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"]
    assert [name for name, _ in nf4_layers(ours)] == expected


def test_saves_bitsandbytes_files_byte_for_byte(make_model, family, tmp_path, quantization_of):
    ours = from_pretrained(make_model(family), quantization_config=NF4Config())
    theirs = load_bitsandbytes(make_model(family))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [tmp_path / who / "model.safetensors" for who in ("ours", "theirs")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert quantization_of(tmp_path / "ours") == quantization_of(tmp_path / "theirs")


def test_bitsandbytes_loads_what_is_saved(make_model, family, tmp_path, tokens):
    ours = from_pretrained(make_model(family), quantization_config=NF4Config())
    ours.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(tokens).logits, ours(tokens).logits)


def test_loads_what_bitsandbytes_saved(make_model, family, tmp_path, tokens, load_as_halfbyte):
    theirs = load_bitsandbytes(make_model(family))
    theirs.save_pretrained(tmp_path)
    ours = load_as_halfbyte(tmp_path)
    assert nf4_layers(ours)
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_case_34_loads_codes_that_are_stored_as_bfloat16(
    make_model, tmp_path, tokens, load_as_halfbyte, dtype
):
    theirs = load_bitsandbytes(make_model(), bnb_4bit_quant_storage="bfloat16")
    theirs.save_pretrained(tmp_path)
    ours = load_as_halfbyte(tmp_path, dtype=dtype)
    kept = torch.bfloat16 if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.uint8, kept}
    torch.testing.assert_close(
        ours(tokens).logits.bfloat16(), theirs(tokens).logits, rtol=0, atol=0.02
    )


def test_saving_what_was_loaded_changes_nothing(make_model, tmp_path, load_as_halfbyte):
    first = from_pretrained(make_model(), quantization_config=NF4Config())
    first.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    load_as_halfbyte(tmp_path / "first").save_pretrained(tmp_path / "again", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "first").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        first, again = (tmp_path / who / shard for who in ("first", "again"))
        assert first.read_bytes() == again.read_bytes()


def test_dequantize_gives_an_ordinary_model(make_model, family, tmp_path, tokens):
    model = from_pretrained(make_model(family), quantization_config=NF4Config())
    expected = model(tokens).logits
    dense = model.dequantize()
    assert not nf4_layers(dense)
    assert torch.equal(dense(tokens).logits, expected)
    dense.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(tokens).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_compute_in_their_own(make_model, tokens, dtype):
    model = from_pretrained(make_model(dtype=dtype), quantization_config=NF4Config())
    layer = model.model.layers[0].mlp.up_proj
    assert layer.quantized.dtype == dtype
    assert model(tokens).logits.dtype == dtype


def test_skip_modules_keep_their_precision(make_model):
    config = NF4Config(skip_modules=["lm_head", "down_proj"])
    model = from_pretrained(make_model(), quantization_config=config)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)


def test_one_configuration_serves_several_models(make_model):
    config = NF4Config()
    from_pretrained(make_model(dtype=torch.float16), quantization_config=config)
    model = from_pretrained(make_model(), quantization_config=config)
    assert config.compute_dtype is None
    assert model.config.quantization_config.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(make_model, device_map, tokens):
    model = from_pretrained(make_model(), quantization_config=NF4Config(), device_map=device_map)
    assert model(tokens).logits.isfinite().all()


def test_weights_cannot_stay_on_disk(make_model, tmp_path):
    with pytest.raises(ConfigError, match="disk"):
        from_pretrained(
            make_model(),
            quantization_config=NF4Config(),
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=tmp_path,
        )


def test_a_deep_copy_is_another_model(make_model, tokens):
    model = from_pretrained(make_model(), quantization_config=NF4Config())
    twin = copy.deepcopy(model)
    expected = model(tokens).logits
    for _, layer in nf4_layers(twin):
        layer.weight.zero_()
    assert torch.equal(model(tokens).logits, expected)


def damage(folder, to, change):
    """Copy a model with its tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (to / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_case_8_a_weight_that_is_not_finite_is_named(make_model, tmp_path, bad):
    name = "model.layers.1.mlp.down_proj.weight"
    folder = damage(make_model(), tmp_path, lambda tensors: tensors[name].view(-1).fill_(bad))
    with pytest.raises(QuantizationError, match=name):
        from_pretrained(folder, quantization_config=NF4Config())


def test_case_11_a_missing_weight_is_named(make_model, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    folder = damage(make_model(), tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name):
        from_pretrained(folder, quantization_config=NF4Config())


def test_case_13_a_transposed_weight_is_named(make_model, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"

    def transpose(tensors):
        tensors[name] = tensors[name].T.contiguous()

    folder = damage(make_model(), tmp_path, transpose)
    with pytest.raises(CheckpointError, match=name):
        from_pretrained(folder, quantization_config=NF4Config())


def test_case_36_plain_weights_that_claim_to_be_quantized(make_model, tmp_path, load_as_halfbyte):
    model = from_pretrained(make_model(), quantization_config=NF4Config())
    model.save_pretrained(tmp_path)
    save_file(
        load_file(make_model() / "model.safetensors"),
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="damaged"):
        load_as_halfbyte(tmp_path)


def test_case_36_quantized_weights_in_a_skipped_module(make_model, tmp_path, load_as_halfbyte):
    everything = NF4Config(skip_modules=["nothing"])
    from_pretrained(make_model(), quantization_config=everything).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"nothing"', '"lm_head"'))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*quantized in the checkpoint"):
        load_as_halfbyte(tmp_path)


@pytest.fixture
def trainer(make_model, tmp_path, tokens):
    def make(model, **settings):
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **settings,
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens] * 4
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    return make


def test_transformers_refuses_to_train_the_codes(make_model, trainer):
    model = from_pretrained(make_model(), quantization_config=NF4Config())
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_peft_adapters_train_on_it(make_model, trainer, tokens, prepared, gradient_checkpointing):
    model = from_pretrained(make_model(), quantization_config=NF4Config())
    if prepared:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=gradient_checkpointing
        )
        norms = [p for name, p in model.named_parameters() if "norm" in name]
        assert {norm.dtype for norm in norms} == {torch.float32}
    assert model.is_loaded_in_4bit
    assert {layer.weight.dtype for _, layer in nf4_layers(model)} == {torch.uint8}
    codes = model.model.layers[0].mlp.up_proj.weight.clone()
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with torch.no_grad():
        before = model(tokens, labels=tokens).loss
    trainer(model, gradient_checkpointing=gradient_checkpointing).train()
    with torch.no_grad():
        assert model(tokens, labels=tokens).loss < before
    base = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert torch.equal(base.weight, codes)


def test_parameters_are_counted_without_bitsandbytes(tmp_path, monkeypatch):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config)
    plain.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, quantization_config=NF4Config())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(
        exclude_embeddings=True
    )
    copied = copy.deepcopy(model)
    copied.requires_grad_(False)
    assert copied.num_parameters(only_trainable=True) == 0
    assert model.dequantize().num_parameters() == plain.num_parameters()
