"""Layers as they run on a CPU against transformers' own, and the compiled loops inside them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from halfbyte.engine.attention import Layout
from halfbyte.engine.body import FusedBody, layer_kind
from halfbyte.engine.cpu_layer import CpuLayer
from halfbyte.engine.layer import FusedLayer
from halfbyte.kernels import native
from halfbyte.quant.linear import NF4Linear

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}
CONFIGS = {"llama": LlamaConfig(**SIZES), "qwen2": Qwen2Config(**SIZES)}


def make_model(kind="llama", *, quantized=True, **lora):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).float()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    if quantized:
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, module in list(part.named_children()):
                    if isinstance(module, torch.nn.Linear):
                        setattr(part, name, NF4Linear.from_linear(module))
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **lora}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model


def fused(model, memory="fast"):
    return FusedBody(model.get_base_model().model, memory=memory, kind=CpuLayer)


def gradients(model, hidden, weight):
    model.zero_grad()
    (hidden.float() * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def check(model, *, memory="fast", tolerance=1e-4):
    body = model.get_base_model().model
    ids, weight = torch.randint(0, 96, (2, 17)), torch.randn(2, 17, 128)
    expected = body(input_ids=ids, use_cache=False)[0]
    want = gradients(model, expected, weight)
    actual = fused(model, memory)(ids)[0]
    got = gradients(model, actual, weight)
    assert error(actual, expected) < tolerance
    assert got.keys() == want.keys()
    assert max(error(got[name], want[name]) for name in want) < tolerance
    return got


@pytest.mark.parametrize("memory", ["fast", "lean", 40_000])
@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_states_and_all_gradients_equal_transformers(kind, memory):
    assert len(check(make_model(kind), memory=memory)) == 3 * 7 * 2


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}},
        {"target_modules": ["k_proj", "up_proj"], "use_rslora": True},
        {"target_modules": ["down_proj"], "alpha_pattern": {"down_proj": 7}},
        {"target_modules": ["o_proj", "gate_proj", "up_proj"], "alpha_pattern": {"up_proj": 5}},
    ],
)
@pytest.mark.parametrize("quantized", [True, False])
def test_partly_adapted_layers(lora, quantized):
    check(make_model(quantized=quantized, **lora))
    check(make_model(quantized=quantized, **lora), memory="lean")


def to_bf16(model):
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        if "lora" not in name and parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    return half


@pytest.mark.parametrize("compiled", [True, False])
def test_bf16_error_is_within_twice_that_of_transformers(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler")
    model = make_model()
    ids, weight = torch.randint(0, 96, (2, 33)), torch.randn(2, 33, 128)
    body = model.get_base_model().model
    exact = gradients(model, body(input_ids=ids, use_cache=False)[0], weight)
    half = to_bf16(model)
    half_body = half.get_base_model().model
    theirs = gradients(half, half_body(input_ids=ids, use_cache=False)[0], weight)
    body_on_cpu = fused(half)
    assert body_on_cpu.agrees()
    ours = gradients(half, body_on_cpu(ids)[0], weight)
    for name, grad in exact.items():
        assert error(ours[name], grad) < 2 * error(theirs[name], grad) + 1e-3, name


def test_packed_documents_equal_each_alone():
    model = make_model()
    body = fused(model)
    lengths = [5, 1, 11]
    documents = [torch.randint(0, 96, (1, n)) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
    hidden = body(torch.cat(documents, 1), positions, Layout(1, 17, bounds, 11))[0]
    assert error(hidden, torch.cat([body(document)[0] for document in documents], 1)) < 1e-5


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_dropout_is_that_of_the_layer_on_a_gpu(memory):
    """Whose masks are tested for being the same in both passes."""
    model = make_model(lora_dropout=0.3).train()
    ids, weight = torch.randint(0, 96, (1, 7)), torch.randn(1, 7, 128)
    results = []
    for kind in (CpuLayer, FusedLayer):
        torch.manual_seed(5)
        body = FusedBody(model.get_base_model().model, memory=memory, kind=kind)
        results.append(gradients(model, body(ids)[0], weight))
    torch.manual_seed(6)
    other = gradients(model, body(ids)[0], weight)
    for name, want in results[1].items():
        assert error(results[0][name], want) < 1e-5
        assert error(other[name], want) > 1e-2


def test_kind_is_chosen_by_device_dtype_and_compiler(monkeypatch):
    weight = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert layer_kind(weight) is (CpuLayer if native.library() else None)
    assert layer_kind(weight.float()) is None
    monkeypatch.setattr(native, "library", lambda: None)
    assert layer_kind(weight) is None
