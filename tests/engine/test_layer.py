import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.adapters.inject import LoraConfig, add_lora
from halfbyte.engine.attention import Layout
from halfbyte.engine.layer import FusedLayer, dropout_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    model = add_lora(LlamaForCausalLM(config), LoraConfig(r=4, lora_dropout=0.1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


def _rope(model, length):
    x = torch.zeros(1, length, 64)
    return model.get_base_model().model.rotary_emb(x, position_ids=torch.arange(length)[None])


@pytest.mark.parametrize("keep", ["all", "attention", "input"])
def test_one_layer_equals_transformers_own(model, keep):
    base = model.eval().get_base_model().model
    x = torch.randn(1, 9, 64, requires_grad=True)
    cos, sin = _rope(model, 9)
    expected = base.layers[1](x, attention_mask=None, position_embeddings=(cos, sin))
    layer = FusedLayer(base.layers[1], base.config, 1)
    assert len(layer.adapters) == 14
    actual = layer.run(x.flatten(0, 1), cos[0], sin[0], Layout(1, 9), keep).view_as(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(x)
    for one, other in zip(
        torch.autograd.grad((actual * weight).sum(), [x, *layer.adapters]),
        torch.autograd.grad((expected * weight).sum(), [x, *layer.adapters]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_seed_drops_and_none_does_not(model):
    base = model.get_base_model().model
    layer = FusedLayer(base.layers[0], base.config, 0)
    assert layer.has_dropout
    assert dropout_of(base.layers[0].mlp.up_proj) == pytest.approx(0.1)
    cos, sin = _rope(model, 5)
    x = torch.randn(5, 64)
    seeds = [None, torch.tensor([1, 0]), torch.tensor([1, 0]), torch.tensor([2, 0])]
    whole, first, again, other = (
        layer.run(x, cos[0], sin[0], Layout(1, 5), "all", seed) for seed in seeds
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, whole)
    assert not torch.equal(first, other)
