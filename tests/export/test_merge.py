"""A merged checkpoint is base plus adapter, rounded once, and loads as a plain model."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.errors import AdapterError, CheckpointError, ConfigError
from halfbyte.export.config import MergeConfig
from halfbyte.export.merge import merge
from halfbyte.models.load import load
from halfbyte.models.quantize import quantize
from halfbyte.quant.config import NF4Config
from halfbyte.quant.quantizer import nf4_layers
from halfbyte.quant.weight import QuantizedWeight

NF4_IDENTITY = {"version": 1, "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


def merged_state(adapted, dtype=torch.bfloat16):
    state = adapted.merge_and_unload().state_dict()
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def assert_equal_within_one_rounding(folder, expected):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # float32 sums in another order may fall on the other side of a rounding boundary.
        apart = (tensor.float() - expected[name].float()).abs()
        ulp = expected[name].float().abs() * torch.finfo(tensor.dtype).eps
        assert (apart <= ulp + 1e-7).all(), name
        assert (apart > 0).float().mean() < 0.001, name


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_equals_pefts_merge_on_the_same_base(tiny_base, make_adapter, tmp_path, onto):
    folder, adapted = make_adapter(tiny_base, in_four_bits=onto == "dequantized")
    result = merge(folder, tmp_path / "merged", onto=onto)
    assert_equal_within_one_rounding(tmp_path / "merged", merged_state(adapted))
    assert result.tensors_merged == 14
    assert 0 < result.rounding_loss < 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [1, 5, 7]},
        {"layers_to_transform": [1]},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_rslora": True},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [2, 259]},
        {"modules_to_save": ["norm", "q_proj"], "target_modules": ["up_proj"]},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_pefts_variants_are_merged_right(tiny_base, make_adapter, tmp_path, settings):
    folder, adapted = make_adapter(tiny_base, **settings)
    merge(folder, tmp_path / "merged")
    assert_equal_within_one_rounding(tmp_path / "merged", merged_state(adapted))


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"bias": "lora_only"}, {"bias": "all"}])
def test_trained_biases_are_merged(make_base, make_adapter, tmp_path, settings):
    base = make_base(attention_bias=True)
    folder, adapted = make_adapter(base, target_modules=["q_proj", "o_proj"], **settings)
    merge(folder, tmp_path / "merged")
    assert_equal_within_one_rounding(tmp_path / "merged", merged_state(adapted))


def test_lora_bias_without_a_bias_in_the_base_is_refused(make_base, make_adapter, tmp_path):
    folder, _ = make_adapter(
        make_base(attention_bias=True), lora_bias=True, target_modules=["q_proj"]
    )
    with pytest.raises(AdapterError, match=r"q_proj\.bias, which the base does not have"):
        merge(folder, tmp_path / "merged", base=make_base())


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head"])
def test_one_of_a_tied_pair_unties_it(make_base, make_adapter, tmp_path, trained):
    base = make_base(tie_word_embeddings=True)
    folder, adapted = make_adapter(base, target_modules=["q_proj", trained])
    embedding = adapted.get_input_embeddings()
    head = adapted.get_output_embeddings()
    before = AutoModelForCausalLM.from_pretrained(base, dtype="auto").lm_head.weight
    merge(folder, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert not model.config.tie_word_embeddings
    layer = embedding if trained == "embed_tokens" else head
    changed = (before.float() + layer.get_delta_weight("default")).to(torch.bfloat16)
    first, second = model.get_input_embeddings().weight, model.lm_head.weight
    if trained == "lm_head":
        first, second = second, first
    torch.testing.assert_close(first.data, changed, rtol=0.01, atol=0)
    assert torch.equal(second, before)


def test_trained_rows_of_a_tied_pair_stay_shared(make_base, make_adapter, tmp_path):
    base = make_base(tie_word_embeddings=True)
    folder, adapted = make_adapter(base, trainable_token_indices=[3, 9])
    merge(folder, tmp_path / "merged")
    expected = merged_state(adapted)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


def test_untouched_tensors_keep_their_bytes(tiny_base, make_adapter, tmp_path):
    folder, _ = make_adapter(tiny_base, in_four_bits=False, target_modules=["q_proj"])
    merge(folder, tmp_path / "merged", onto="original")
    before = load_file(tiny_base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


def test_a_four_bit_checkpoint_is_a_base(tiny_base, make_adapter, tmp_path):
    config = NF4Config()
    four_bit = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=config, dtype=torch.bfloat16
    )
    four_bit.save_pretrained(tmp_path / "four_bit")
    folder, adapted = make_adapter(tiny_base)
    merge(folder, tmp_path / "merged", base=tmp_path / "four_bit")
    assert_equal_within_one_rounding(tmp_path / "merged", merged_state(adapted))
    with pytest.raises(AdapterError, match="16-bit base"):
        merge(folder, tmp_path / "other", base=tmp_path / "four_bit", onto="original")


def test_conv1d_weights_are_merged_the_other_way_round(make_adapter, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64,
        n_layer=1,
        n_head=2,
        n_positions=32,
        vocab_size=100,
        eos_token_id=0,
        bos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")
    folder, adapted = make_adapter(
        tmp_path / "gpt2",
        in_four_bits=False,
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
    )
    merge(folder, tmp_path / "merged", onto="original")
    assert_equal_within_one_rounding(tmp_path / "merged", merged_state(adapted))


def test_the_dtype_is_chosen_and_written(tiny_base, make_adapter, tmp_path):
    folder, adapted = make_adapter(tiny_base)
    result = merge(folder, tmp_path / "merged", dtype="float32")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert result.rounding_loss == 0
    assert_equal_within_one_rounding(tmp_path / "merged", merged_state(adapted, torch.float32))


def test_a_base_that_was_cast_before_it_was_quantized_keeps_its_dtype(
    tiny_base, make_adapter, tmp_path
):
    identity = {**NF4_IDENTITY, "weights": {"block_size": 64, "dtype": "float32"}}
    folder, adapted = make_adapter(tiny_base, identity=identity)
    merge(folder, tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    expected = merged_state(adapted)["model.layers.0.mlp.up_proj.weight"].float()
    found = state["model.layers.0.mlp.up_proj.weight"].float()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-3)


def test_tokenizer_template_and_shards_come_along(tiny_base, make_adapter, tmp_path):
    folder, _ = make_adapter(tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    merge(folder, tmp_path / "merged", max_shard_size="50KB")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == tokenizer.chat_template
    assert (tmp_path / "merged" / "generation_config.json").is_file()
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def break_tensor(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_damaged_adapters_are_refused_and_leave_nothing(tiny_base, make_adapter, tmp_path):
    folder, _ = make_adapter(tiny_base)
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    original = load_file(folder / "adapter_model.safetensors")

    def refuses(change, message):
        save_file(original, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        break_tensor(folder, change)
        with pytest.raises(AdapterError, match=message):
            merge(folder, tmp_path / "merged")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    refuses(lambda t: t[f"{q_proj}.lora_A.weight"].fill_(float("nan")), "NaN or Inf")
    refuses(lambda t: t.pop(f"{q_proj}.lora_B.weight"), "no lora_B for")
    refuses(lambda t: t.update({"base_model.model.odd": torch.ones(1)}), "odd .* is no LoRA tensor")
    refuses(
        lambda t: t.update({f"{q_proj}.lora_A.weight": torch.ones(4, 32)}), r"should be \[4, 64\]"
    )


def test_an_adapter_that_changes_its_base_at_the_start_is_refused(
    tiny_base, make_adapter, tmp_path
):
    folder, _ = make_adapter(tiny_base, init_lora_weights="pissa", target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="pissa"):
        merge(folder, tmp_path / "merged")


def test_it_says_what_is_missing(tiny_base, make_adapter, tmp_path):
    folder, _ = make_adapter(tiny_base, identity=None)
    with pytest.raises(AdapterError, match="how training held the base") as caught:
        merge(folder, tmp_path / "merged")
    assert "onto=original" in caught.value.hint
    merge(folder, tmp_path / "merged", quant=NF4Config())
    with pytest.raises(CheckpointError, match="already exists"):
        merge(folder, tmp_path / "merged", quant=NF4Config())
    merge(folder, tmp_path / "merged", quant=NF4Config(), overwrite=True)
    with pytest.raises(CheckpointError, match="there is no folder 'no/where'") as caught:
        merge(folder, tmp_path / "other", base="no/where")
    assert "--base" in caught.value.hint
    with pytest.raises(ConfigError, match="onto should be"):
        merge(folder, tmp_path / "other", onto="both")
    with pytest.raises(ConfigError, match="dtype should be"):
        merge(folder, tmp_path / "other", dtype="int8")


def test_new_tokens_with_trained_tables_are_merged(tiny_base, tmp_path):
    """peft saves embedding and head beside an adapter whose model has grown."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model.resize_token_embeddings(264, mean_resizing=False)
    adapted = peft.get_peft_model(model.float(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(tmp_path / "adapter", tmp_path / "merged", onto="original")
    assert_equal_within_one_rounding(tmp_path / "merged", merged_state(adapted))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 264


def test_new_tokens_with_trained_rows_are_merged(make_base, tmp_path):
    base = make_base(tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model.resize_token_embeddings(263, mean_resizing=False)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=[5, 260, 261, 262]
    )
    adapted = peft.get_peft_model(model.float(), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "adapter", tmp_path / "merged", onto="original")
    assert_equal_within_one_rounding(tmp_path / "merged", merged_state(adapted))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_quantized_again_it_is_a_4_bit_checkpoint_of_the_sum(
    tiny_base, make_adapter, tmp_path, compute
):
    folder, adapted = make_adapter(tiny_base, in_four_bits=False)
    result = merge(folder, tmp_path / "merged", onto="quantized", dtype=compute)
    assert "Warning" in result.words()[-1]
    dtype = getattr(torch, compute)
    model, _ = load(tmp_path / "merged", device="cpu", dtype=dtype)
    layers = dict(nf4_layers(model))
    assert len(layers) == 14
    for name, weight in adapted.merge_and_unload().state_dict().items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            continue
        expected = QuantizedWeight.quantize(weight).dequantize(dtype)
        differ = (layer.dequantize() != expected).float().mean()
        assert differ < 1e-3, name  # a float32 sum in another order may be on another side
    assert 0.5 < result.update_kept < 1.5


def test_a_4_bit_merge_is_read_by_bitsandbytes(make_base, make_adapter, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # On a CPU bitsandbytes 0.50 reads rows of whole blocks only.
    folder, _ = make_adapter(make_base(intermediate_size=192), in_four_bits=False)
    merge(folder, tmp_path / "merged", onto="quantized")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ours, _ = load(tmp_path / "merged", device="cpu")
    for name, layer in nf4_layers(ours):
        weight = theirs.get_submodule(name).weight
        read = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(read, layer.dequantize()), name


def test_4_bits_alone_cannot_be_merged_into_4_bits(tiny_base, make_adapter, tmp_path):
    quantize(tiny_base, tmp_path / "four_bit")
    folder, _ = make_adapter(tiny_base)
    with pytest.raises(AdapterError, match="onto=quantized needs the 16-bit base"):
        merge(folder, tmp_path / "merged", base=tmp_path / "four_bit", onto="quantized")


def test_rows_decide_onto_what(tiny_base, make_adapter, rows, tmp_path):
    folder, _ = make_adapter(tiny_base)
    result = merge(folder, tmp_path / "merged", data=rows)
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report == json.loads(json.dumps(result.report()))
    assert report["onto"] == "dequantized"
    found = report["measured"]["candidates"]
    assert found["dequantized"]["kl"] < found["original"]["kl"]
    assert set(report["rounding"]["by_tensor"]) == set(result.rounding)
    assert len(result.rounding) == 14
    kept = [each["kept"] for each in report["rounding"]["by_tensor"].values()]
    assert all(0.9 < each < 1.1 for each in kept)


def test_settings_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no setting 'into'") as caught:
        merge(tmp_path, tmp_path / "merged", into="original")
    assert "onto" in caught.value.hint
    with pytest.raises(ConfigError, match="a config and settings"):
        merge(tmp_path, tmp_path / "merged", MergeConfig(), onto="original")


def test_a_folder_that_is_taken_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        merge(tmp_path / "no adapter", tmp_path / "merged")


@pytest.mark.gpu
@pytest.mark.parametrize("onto", ["dequantized", "original", "quantized"])
def test_the_gpu_merges_like_the_cpu(tiny_base, make_adapter, rows, tmp_path, onto):
    folder, _ = make_adapter(tiny_base)
    states = []
    for device in ("cpu", "cuda"):
        result = merge(folder, tmp_path / device, onto=onto, device=device, data=rows)
        assert onto in result.choice.measured.candidates
        model, _ = load(tmp_path / device, quant=None, device="cpu", dtype=torch.float32)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        # Double quantization's offset, a float32 mean, differs in its last place between devices:
        # then some sums round to the next bfloat16.
        far = (tensor - states[1][name]).abs() > 1e-2 * tensor.abs().max()
        assert far.float().mean() < 1e-3, name
