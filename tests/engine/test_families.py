"""Every family that runs fused, against transformers' and peft's own layers."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    MinistralConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from halfbyte.engine.attention import Layout
from halfbyte.engine.body import FusedBody
from halfbyte.engine.cpu_layer import CpuLayer
from halfbyte.engine.families import NO_ROPE, family_of, parts_of, text_part
from halfbyte.engine.layer import FusedLayer
from halfbyte.engine.obstacle import obstacle
from halfbyte.quant.linear import NF4Linear

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALF_TURNS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# Windows are shorter than the sequences, heads wider or narrower than hidden size / heads.
CONFIGS = {
    "gemma": GemmaConfig(**SIZES, head_dim=24),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, sliding_window=5, attn_logit_softcapping=None,
        query_pre_attn_scalar=20,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "ministral": MinistralConfig(
        **SIZES, head_dim=24, sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "phi3": Phi3Config(**SIZES, sliding_window=5, rope_parameters=HALF_TURNS),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
}  # fmt: skip
IDS = torch.arange(34).mul_(37).remainder_(96).view(2, 17)
WEIGHT = torch.linspace(-900, 900, 34 * 64).sin().view(2, 17, 64)
each_family = pytest.mark.parametrize("kind", CONFIGS)


def make(kind, *, dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).float()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(part, name, NF4Linear.from_linear(module))
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules="all-linear")
    lora.lora_dropout = dropout
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
        elif "lora" not in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def body_of(model):
    return model.get_base_model().model


def gradients(model, hidden, weight=WEIGHT):
    model.zero_grad()
    (hidden.float() * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@functools.cache
def exact(kind):
    """Return a model, its hidden states and all gradients by transformers' own layers."""
    model = make(kind)
    hidden = body_of(model)(input_ids=IDS, use_cache=False)[0]
    return model, hidden.detach(), gradients(model, hidden)


@pytest.mark.parametrize(
    ("layer", "memory"),
    [(FusedLayer, "fast"), (FusedLayer, "lean"), (FusedLayer, 60_000), (CpuLayer, "lean")],
)
@each_family
def test_hidden_states_and_all_gradients_equal_transformers(kind, memory, layer):
    model, hidden, grads = exact(kind)
    assert obstacle(body_of(model)) is None
    fused = FusedBody(body_of(model), memory=memory, kind=layer)
    assert fused.agrees()
    actual = fused(IDS)[0]
    assert error(actual, hidden) < 1e-5
    again = gradients(model, actual)
    assert again.keys() == grads.keys()
    assert len(grads) == 2 * 2 * (4 if kind == "phi3" else 7)
    assert max(error(again[name], grads[name]) for name in grads) < 1e-4


@each_family
def test_bf16_error_is_that_of_transformers(kind):
    """Of all gradients together: those of one adapter are too few numbers to compare noise."""
    _, hidden, grads = exact(kind)
    half = make(kind, dtype=torch.bfloat16)
    body = body_of(half)

    def errors(run):
        states = run(IDS)[0]
        own = gradients(half, states)
        each = torch.tensor([error(own[name], grad) for name, grad in grads.items()])
        return error(states.detach(), hidden), each.square().mean().sqrt(), each.max()

    theirs = errors(functools.partial(body, use_cache=False))
    for layer in (FusedLayer, CpuLayer):
        ours = errors(FusedBody(body, memory="fast", kind=layer))
        assert ours[0] < 1.3 * theirs[0]
        assert ours[1] < 1.5 * theirs[1]
        assert ours[2] < 2 * theirs[2]


@pytest.mark.parametrize("kind", ["gemma3", "phi3", "smollm3"])
def test_packed_documents_equal_each_alone(kind):
    fused = FusedBody(body_of(exact(kind)[0]), memory="fast")
    lengths = [7, 1, 9]
    documents = [IDS[1:, :n] for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 7, 8, 17], dtype=torch.int32)
    hidden = fused(torch.cat(documents, 1), positions, Layout(1, 17, bounds, 9))[0]
    assert error(hidden, torch.cat([fused(document)[0] for document in documents], 1)) < 1e-5


@pytest.mark.parametrize("kind", ["gemma3", "phi3"])
def test_dropout_is_the_same_whatever_is_saved_and_wherever_it_runs(kind):
    model = make(kind, dropout=0.3).train()
    body, results = body_of(model), []
    for memory, layer in (("fast", FusedLayer), ("lean", FusedLayer), ("lean", CpuLayer)):
        torch.manual_seed(5)
        fused = FusedBody(body, memory=memory, kind=layer)
        results.append(gradients(model, fused(IDS)[0]))
    undropped = gradients(model.eval(), fused(IDS)[0])
    for name, want in results[0].items():
        assert all(error(other[name], want) < 1e-5 for other in results[1:])
        assert error(undropped[name], want) > 1e-2


def test_of_a_multimodal_model_the_language_model_runs_fused():
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=CONFIGS["gemma3"], vision_config=vision, mm_tokens_per_image=4,
        image_token_index=95,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float()
    text = text_part(model)
    assert text is model.model.language_model
    assert obstacle(text) is None
    expected = model.model(input_ids=IDS, use_cache=False)[0]
    assert error(FusedBody(text)(IDS)[0], expected) < 1e-5
    assert text_part(text) is None


def test_a_layer_is_read_by_its_family():
    def parts(kind):
        body = body_of(exact(kind)[0])
        return [parts_of(layer, body.config) for layer in body.layers]

    first, second = parts("gemma3")
    assert (first.window, first.rope) == (5, "sliding_attention")
    assert (second.window, second.rope) == (None, "full_attention")
    assert [p.rope for p in parts("smollm3")] == [None, NO_ROPE]
    assert [p.window for p in parts("qwen2")] == [None, 5]
    assert list(parts("phi3")[0].projections) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert family_of(torch.nn.LayerNorm(2)) is None
