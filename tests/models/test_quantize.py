import json

import pytest
import torch
import transformers

from halfbyte.checkpoint.publish import verify
from halfbyte.checkpoint.reader import CheckpointReader
from halfbyte.errors import CheckpointError, QuantizationError
from halfbyte.models.load import load
from halfbyte.models.quantize import quantize
from halfbyte.quant.config import NF4Config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}
CONFIGS = {
    "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biases": lambda: transformers.Qwen2Config(**SIZES),
    "conv1d": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=260),
    "experts": lambda: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "renamed": lambda: transformers.GPTNeoXConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
}


@pytest.fixture(params=["plain", *CONFIGS])
def any_base(request, base):
    """Bases with everything that makes names or weights special."""
    if request.param != "plain":
        torch.manual_seed(0)
        config = CONFIGS[request.param]()
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
            base
        )
    return base


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_writes_what_save_pretrained_would(any_base, tmp_path, shard_bytes):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        any_base, quantization_config=NF4Config(), device_map="cpu"
    )
    model.save_pretrained(tmp_path / "saved")
    quantize(any_base, tmp_path / "out", device="cpu", max_shard_bytes=shard_bytes)
    if shard_bytes == 10**9:
        files = [tmp_path / who / "model.safetensors" for who in ("saved", "out")]
        assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("saved", "out")]
    assert configs[0] == configs[1]
    again, _ = load(tmp_path / "out", device="cpu", dtype="bfloat16")
    tokens = torch.arange(2, 18)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_bitsandbytes_loads_it(make_base, tmp_path, tokens):
    # bitsandbytes' CPU code is wrong where rows are no multiple of 64.
    out = quantize(make_base(intermediate_size=128), tmp_path / "out", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    ours, _ = load(out, device="cpu", dtype="bfloat16")
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_follows_its_configuration(base, tmp_path):
    config = NF4Config(
        "fp4", block_size=128, double_quant=False, skip_modules=["lm_head", "v_proj"]
    )
    model, _ = load(quantize(base, tmp_path / "out", config=config, device="cpu"), device="cpu")
    attention = model.model.layers[0].self_attn
    assert attention.v_proj.weight.dtype.is_floating_point
    weight = attention.q_proj.quantized
    assert (weight.quant_type, weight.block_size, weight.nested) == ("fp4", 128, None)


def test_copies_the_tokenizer_and_no_weights_or_code(base, tmp_path):
    for name in ("pytorch_model.bin", "modeling.py", "model.safetensors.index.json", ".hidden"):
        (base / name).write_text("{}")
    (base / "README.md").write_text("a card")
    out = quantize(base, tmp_path / "out", device="cpu")
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert "README.md" in names
    assert not names & {"pytorch_model.bin", "modeling.py", "model.safetensors.index.json"}
    verify(out)


def test_copies_named_chat_templates(base, tmp_path):
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    out = quantize(base, tmp_path / "out", device="cpu")
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    verify(out)


def test_does_not_follow_a_link_out_of_the_folder(base, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link"):
        quantize(base, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_case_12_tensors_that_the_model_does_not_have(base, tmp_path, change_tensors, caplog):
    change_tensors(base, lambda tensors: tensors.update(extra=torch.zeros(3)))
    out = quantize(base, tmp_path / "out", device="cpu")
    assert "'extra'" in caplog.text
    assert "extra" not in CheckpointReader(out).names()


def test_does_not_replace_what_is_there(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        quantize(base, out, device="cpu")
    quantize(base, out, device="cpu", overwrite=True)
    assert not (out / "mine").exists()


def test_does_not_replace_the_model_itself(base):
    with pytest.raises(CheckpointError, match="the model itself"):
        quantize(base, base, device="cpu", overwrite=True)


def test_quantizes_once(base, tmp_path):
    out = quantize(base, tmp_path / "out", device="cpu")
    with pytest.raises(CheckpointError, match="already"):
        quantize(out, tmp_path / "again", device="cpu")


@pytest.mark.parametrize(
    ("error", "damage"),
    [
        (QuantizationError, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)),
        (CheckpointError, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
    ],
)
def test_an_error_names_the_weight_and_leaves_nothing(
    base, tmp_path, change_tensors, error, damage
):
    change_tensors(base, damage)
    with pytest.raises(error, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(base, tmp_path / "out", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_weight_without_the_models_prefix(base, tmp_path, tokens, change_tensors):
    config = CONFIGS["conv1d"]()
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        base
    )

    def shorten(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    change_tensors(base, shorten)
    expected, _ = load(base, device="cpu", dtype="bfloat16")
    out = quantize(base, tmp_path / "out", device="cpu")
    again, _ = load(out, device="cpu", dtype="bfloat16")
    assert torch.equal(again(tokens).logits, expected(tokens).logits)
