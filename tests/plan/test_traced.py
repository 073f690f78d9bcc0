"""Counting on fake tensors gives what real ones take."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GemmaConfig, Phi3Config

import halfbyte as hb
from halfbyte.memory.ledger import Ledger
from halfbyte.plan.traced import _Counting, trace_step

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "pad_token_id": 0, "num_hidden_layers": 6,
}  # fmt: skip


@pytest.mark.parametrize("config", [GemmaConfig(**SMALL, head_dim=16), Phi3Config(**SMALL)])
def test_fake_layers_take_what_real_ones_do(config):
    torch.manual_seed(0)
    config._attn_implementation = "eager"  # the same operations both ways
    model = hb.add_lora(AutoModelForCausalLM.from_config(config), hb.LoraConfig(r=4)).train()
    causal = model.get_base_model()
    planned = Ledger()
    trace_step(planned, causal, batch=2, length=32, labels=62, chunk_rows=16)

    for parameter in causal.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    measured = Ledger()
    counting = _Counting(measured)
    assert isinstance(counting, TorchDispatchMode)
    tensors = [*causal.parameters(), *causal.buffers()]
    counting.ignore(*tensors, *(p.grad for p in tensors if p.grad is not None))
    ids = torch.zeros(2, 32, dtype=torch.int64)
    with counting:
        hidden = causal.model(input_ids=ids, use_cache=False)[0]
        selected = hidden.flatten(0, 1)[:62].clone()
        del hidden
        grad = torch.empty_like(selected)
        selected.backward(grad)
    # The first adapter has no input that needs a gradient, so the first layers differ a little.
    assert planned.peak.nbytes == pytest.approx(measured.peak.nbytes, rel=0.05)
    assert set(planned.peak.owners) <= {"activations", "logits", "dequantize workspace"}
