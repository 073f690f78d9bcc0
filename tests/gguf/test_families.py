"""Families are refused where llama.cpp would compute something else."""

import pytest
import torch
import transformers

from halfbyte.errors import CheckpointError
from halfbyte.gguf.families import FAMILIES, find_family, head_dim, limits

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "head_dim": 16}


def test_unknown_models_are_told_what_there_is():
    with pytest.raises(CheckpointError, match=r"'gpt2' cannot .* llama, mistral, qwen2") as caught:
        find_family(transformers.GPT2Config())
    assert "transformers or vLLM" in caught.value.hint


def test_rows_of_q_and_k_are_interleaved_by_head():
    config = transformers.LlamaConfig(**{**SMALL, "head_dim": None}, num_key_value_heads=2)
    rows = torch.arange(64.0).unsqueeze(1)
    q = FAMILIES["llama"].convert("model.layers.0.self_attn.q_proj.weight", rows, config)
    assert q[:4, 0].tolist() == [0, 8, 1, 9]  # heads of 16: halves of 8
    assert q[16:18, 0].tolist() == [16, 24]
    k = FAMILIES["llama"].convert("model.layers.0.self_attn.k_proj.weight", rows[:32], config)
    assert k[:4, 0].tolist() == [0, 8, 1, 9]
    name = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(FAMILIES["llama"].convert(name, rows, config), rows)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(FAMILIES["qwen2"].convert(name, rows, config), rows)


def test_gemmas_norms_get_their_one():
    config = transformers.GemmaConfig(**SMALL)
    ones = FAMILIES["gemma"].convert("model.norm.weight", torch.zeros(4), config)
    assert ones.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.LlamaConfig(**SMALL, hidden_act="gelu"), "hidden_act='silu'"),
        (
            transformers.Gemma2Config(**SMALL, query_pre_attn_scalar=100),
            "query_pre_attn_scalar=16",
        ),
        (
            transformers.Gemma2Config(
                **SMALL, query_pre_attn_scalar=16, layer_types=["full_attention"] * 4
            ),
            "layer_types",
        ),
    ],
)
def test_settings_that_llama_cpp_has_otherwise_are_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        find_family(config).check(config, is_tied=True)


def test_gemma_cannot_be_untied():
    config = transformers.GemmaConfig(**SMALL)
    with pytest.raises(CheckpointError, match="one matrix for embedding and output"):
        find_family(config).check(config, is_tied=False)


def test_the_largest_gemma_has_its_own_attention_scale():
    config = transformers.Gemma2Config(
        **{**SMALL, "num_hidden_layers": 46, "head_dim": 32}, query_pre_attn_scalar=16
    )
    find_family(config).check(config, is_tied=True)


def test_a_window_that_llama_cpp_ignores_is_said():
    assert not limits(transformers.LlamaConfig(**SMALL))
    assert not limits(transformers.Gemma2Config(**SMALL))
    config = transformers.MistralConfig(**SMALL, sliding_window=4096)
    assert "4,096 tokens" in limits(config)[0]


def test_head_dim_is_found_where_it_is_not_said():
    assert head_dim(transformers.LlamaConfig(hidden_size=64, num_attention_heads=4)) == 16
    assert head_dim(transformers.Qwen3Config(hidden_size=64, head_dim=128)) == 128
