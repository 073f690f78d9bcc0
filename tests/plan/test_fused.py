"""The formulas of the ledger save what the engine saves."""

import pytest
import torch

import halfbyte as hb
from halfbyte.engine.attention import Layout
from halfbyte.engine.body import FusedBody
from halfbyte.memory.fused_step import FusedStep
from halfbyte.memory.ledger import Ledger
from halfbyte.plan.fused import fused_shape
from halfbyte.quant.linear import NF4Linear

TOKENS = 64


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def body(request):
    """Of Llama, and of the family that differs most from it."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 96,
        "attn_implementation": "sdpa", "pad_token_id": 0,
    }  # fmt: skip
    layer_types = ["full_attention", "sliding_attention"]
    is_llama = request.param == "llama"
    config = (
        LlamaConfig(**sizes) if is_llama else Gemma3TextConfig(**sizes, layer_types=layer_types)
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, NF4Linear.from_linear(module))
    model = hb.add_lora(model, hb.LoraConfig(r=8)).train()
    return FusedBody(model.get_base_model().model)


@pytest.mark.parametrize("level", ["all", "attention", "input", "offload"])
def test_saved_bytes_are_those_that_autograd_keeps(body, level):
    layer = body.layers[1]
    x = torch.randn(TOKENS, 128, requires_grad=True)
    cos = torch.ones(TOKENS, 32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = {p.untyped_storage().data_ptr() for p in body.model.parameters()}
    held.add(cos.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer.run(x, cos, cos, Layout(1, TOKENS), level)
    saved = sum(nbytes for pointer, nbytes in kept.items() if pointer not in held)
    shape = fused_shape(body, itemsize=4)
    assert y.requires_grad
    expected = shape.saved_bytes(level, TOKENS)
    assert saved == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("level", ["all", "attention", "input"])
def test_a_step_gives_back_all_that_it_takes(body, level):
    ledger = Ledger({"weights": 10**6})
    before = ledger.nbytes
    step = FusedStep(ledger, fused_shape(body, itemsize=2), TOKENS, [level] * 2)
    step.write(labels=TOKENS - 1, vocabulary=96, chunk_rows=16)
    assert ledger.nbytes == before
    assert ledger.peak.nbytes == sum(ledger.peak.owners.values())


def test_keeping_less_needs_less_and_more_tokens_need_more(body):
    shape = fused_shape(body, itemsize=2)

    def peak(level, tokens):
        ledger = Ledger()
        FusedStep(ledger, shape, tokens, [level] * 16).write(
            labels=tokens, vocabulary=96, chunk_rows=64
        )
        return ledger.peak.nbytes

    sizes = [peak(level, 512) for level in ("input", "attention", "all")]
    assert sizes == sorted(sizes)
    assert peak("input", 1024) > 1.8 * sizes[0]
