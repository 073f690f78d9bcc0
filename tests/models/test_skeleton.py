"""What names and headers alone tell; messages to users are tested with `load`."""

import pytest
import torch
import transformers

from halfbyte.errors import CheckpointError
from halfbyte.models.load import load
from halfbyte.models.skeleton import conv1d_weights, read_skeleton

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}


def save(config, folder):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder
    )


def test_takes_no_memory_and_names_every_tensor(base):
    skeleton = read_skeleton(base)
    assert {parameter.device.type for parameter in skeleton.model.parameters()} == {"meta"}
    assert skeleton.names == {name: name for name in skeleton.model.state_dict()}
    assert not skeleton.converted
    assert not skeleton.unknown
    assert skeleton.quantization is None


def test_a_four_bit_weight_is_named_once(base):
    load(base, device="cpu")[0].save_pretrained(base)
    skeleton = read_skeleton(base)
    assert len(skeleton.packed) == 14
    assert skeleton.names == {name: name for name in skeleton.model.state_dict()}
    assert skeleton.quantization["bnb_4bit_quant_type"] == "nf4"


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_of_tied_tensors_either_will_do(base, change_tensors, kept):
    save(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), base)

    def keep(tensors):
        tensors[kept] = tensors.pop("model.embed_tokens.weight")

    change_tensors(base, keep)
    assert kept in read_skeleton(base).names
    change_tensors(base, lambda tensors: tensors.pop(kept))
    with pytest.raises(CheckpointError, match="lacks 2"):
        read_skeleton(base)


@pytest.fixture
def experts(base):
    config = transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    save(config, base)
    return base


def test_experts_are_put_together_from_what_is_on_disk(experts):
    skeleton = read_skeleton(experts)
    assert len(skeleton.converted) == 2 * 4 * 3
    assert all(".experts." in name for name in skeleton.converted)


@pytest.mark.parametrize(
    "gone", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"]
)
def test_beside_experts_a_missing_tensor_is_found_too(experts, change_tensors, gone):
    change_tensors(experts, lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=gone):
        read_skeleton(experts)


def test_other_names_on_disk_are_matched(base):
    save(
        transformers.GPTNeoXConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        ),
        base,
    )
    skeleton = read_skeleton(base)
    assert set(skeleton.names) == set(skeleton.reader.names())
    assert set(skeleton.names.values()) == set(skeleton.model.state_dict())


def test_what_the_model_has_no_place_for(base, change_tensors):
    change_tensors(base, lambda tensors: tensors.update(extra=torch.zeros(3)))
    assert read_skeleton(base).unknown == ["extra"]


def test_weights_of_conv1d_are_told_apart(base):
    save(transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=260), base)
    assert conv1d_weights(read_skeleton(base).model) == {
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
