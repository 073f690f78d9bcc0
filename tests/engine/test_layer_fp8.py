"""Layers in eight bits, put together: near the exact ones, and the same however they are run."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from halfbyte.adapters.inject import LoraConfig, add_lora
from halfbyte.engine.attention import Layout
from halfbyte.engine.body import FusedBody
from halfbyte.engine.layer import Fp8Layer
from halfbyte.engine.projections_fp8 import Fp8Siblings
from halfbyte.quant.linear import NF4Linear

TOKENS = 33
LENGTHS = (5, 1, 27)


@pytest.fixture(scope="module")
def model():
    """A small Qwen2, which has biases, in four bits, with dropout."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, NF4Linear.from_linear(module))
    model = add_lora(model, LoraConfig(r=8, lora_dropout=0.2)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bias" in name:
            parameter.data.normal_(0, 0.05)
    return model


def _run(model, hidden):
    """Return hidden states and the gradients of all adapters."""
    model.zero_grad()
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * weight).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _in_fp8(model, memory="fast", **settings):
    fused = FusedBody(model.get_base_model().model, memory=memory, kind=Fp8Layer, **settings)
    groups = [group for layer in fused.layers for group in layer.all_siblings]
    assert all(type(group) is Fp8Siblings for group in groups)
    return fused


def _ids():
    return torch.randint(0, 96, (1, TOKENS), generator=torch.Generator().manual_seed(2))


def _errors(actual, expected):
    return [
        ((one - other).norm() / other.norm()).item()
        for one, other in zip(actual, expected, strict=True)
    ]


def test_a_model_is_off_by_what_three_bits_cost(model):
    body = model.eval().get_base_model().model
    expected = _run(model, body(input_ids=_ids(), use_cache=False)[0])
    hidden, *grads = _errors(_run(model, _in_fp8(model)(_ids())[0]), expected)
    assert len(grads) == 2 * 7 * 2
    assert 0.002 < hidden < 0.06
    assert max(grads) < 0.2
    assert sum(grads) / len(grads) < 0.1


@pytest.mark.parametrize("drops", [False, True])
def test_memory_changes_no_bit(model, drops):
    """Not what is saved, computed again or offloaded, what stays, nor what goes in tiles."""

    def run(*, stays=False, **settings):
        fused = _in_fp8(model.train(drops), **settings)
        for granted in (False, stays):
            for layer in fused.layers:
                for group in layer.all_siblings:
                    group.stay.granted = granted
            torch.manual_seed(3)
            found = _run(model, fused(_ids())[0])
        assert bool(fused._staying_bytes()) == stays
        return found

    once = run(memory="fast")
    for settings in ({"memory": "fast", "stays": True}, {"memory": "lean"}, {"memory": 60_000}):
        assert all(torch.equal(*pair) for pair in zip(run(**settings), once, strict=True))
    # Products of fewer rows add in another order, and a number between two is then rounded apart.
    assert max(_errors(run(memory="lean", max_tile=8), once)) < 0.05


def test_packed_documents_equal_each_alone(model):
    fused = _in_fp8(model.eval())
    documents = _ids().split(LENGTHS, 1)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    bounds = torch.tensor([0, 5, 6, 33], dtype=torch.int32)
    hidden = fused(_ids(), positions, Layout(1, TOKENS, bounds, max(LENGTHS)))[0]
    alone = torch.cat([fused(document)[0] for document in documents], 1)
    # Rows have scales of their own; what differs is rounding before them.
    assert _errors([hidden], [alone])[0] < 0.02
