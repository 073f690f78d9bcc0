"""Recomputing a layer saves what it would keep, and changes no gradient."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.errors import ConfigError
from halfbyte.memory.activations import checkpoint_activations

SIZE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE)).train()


def saved_bytes_and_gradient(model):
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(48).unsqueeze(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    loss.backward()
    kept = sum(size for pointer, size in saved.items() if pointer not in weights)
    return kept, model.model.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
def test_keeps_less_for_the_same_gradient(options):
    kept, expected = saved_bytes_and_gradient(model())
    recomputing = model()
    checkpoint_activations(recomputing, options)
    kept_less, gradient = saved_bytes_and_gradient(recomputing)
    assert torch.equal(gradient, expected)
    assert kept_less < kept / 2


def test_model_that_cannot_is_named():
    class Stubborn(nn.Module):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
            raise ValueError("not compatible")

    with pytest.raises(ConfigError, match="Stubborn cannot recompute activations: not compatible"):
        checkpoint_activations(Stubborn())
