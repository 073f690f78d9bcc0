"""Packed examples are told apart, or the run does not start."""

import pytest
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import sdpa_mask

from halfbyte.errors import ConfigError
from halfbyte.train.loss import LanguageModel
from halfbyte.train.packing import attention_name, prove_packing


def leaky(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention that forgets where examples begin."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def leaky_llama(make_llama):
    AttentionInterface.register("leaky", leaky)
    AttentionMaskInterface.register("leaky", sdpa_mask)
    return make_llama("leaky")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_examples_do_not_see_each_other(make_lora, attention):
    model = make_lora(attn_implementation=attention)
    parts = LanguageModel.of(model)
    model.train()
    assert attention_name(parts) in prove_packing(parts)
    assert model.training


def test_a_model_of_another_kind(make_llama):
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5)
    assert "do not see each other" in prove_packing(LanguageModel.of(GPT2LMHeadModel(config)))


@pytest.mark.parametrize("taken_apart", [True, False])
def test_an_attention_that_leaks_is_named(leaky_llama, taken_apart):
    parts = LanguageModel.of(leaky_llama) if taken_apart else LanguageModel(leaky_llama)
    with pytest.raises(ConfigError, match=r"on the attention '.*leaky'.* behind it from") as error:
        prove_packing(parts)
    assert "packing: false" in error.value.hint
