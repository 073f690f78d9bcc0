import contextlib
import copy
from dataclasses import replace
from math import nan

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from halfbyte.engine import policy
from halfbyte.engine.attention import Layout
from halfbyte.engine.attention import attention as plain_attention
from halfbyte.engine.body import FusedBody
from halfbyte.engine.obstacle import obstacle
from halfbyte.engine.offload import Offload
from halfbyte.errors import ConfigError
from halfbyte.kernels.rms_norm import Norm
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
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
}


def _model(kind="llama", *, quantized=True, dtype=torch.float32, **lora):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).to(dtype)
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


def _gradients(model, hidden, weight):
    model.zero_grad()
    (hidden.float() * weight).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_agree_until_one_differs(attention):
    model = _model()
    body = model.get_base_model().model
    body.config._attn_implementation = attention
    fused = FusedBody(body)
    assert fused.agrees()
    out = fused.layers[1].out
    fused.layers[1].out = replace(out, norm=Norm(out.norm.weight * 1.2, out.norm.eps))
    assert not fused.agrees()


def test_layers_agree_where_a_trained_adapter_drops_elements():
    fused = FusedBody(_model(lora_dropout=0.5).train().get_base_model().model)
    assert fused.agrees()
    assert fused.model.training


@pytest.mark.parametrize("memory", ["fast", "lean", 40_000])
@pytest.mark.parametrize("kind", CONFIGS)
def test_hidden_states_and_all_gradients_equal_transformers(kind, memory):
    model = _model(kind)
    body = model.get_base_model().model
    assert obstacle(body) is None
    ids = torch.randint(0, 96, (2, 17))
    weight = torch.randn(2, 17, 128)
    expected = body(input_ids=ids, use_cache=False)[0]
    grads = _gradients(model, expected, weight)
    fused = FusedBody(body, memory=memory)
    actual = fused(ids)[0]
    again = _gradients(model, actual, weight)
    assert _error(actual, expected) < 1e-5
    assert again.keys() == grads.keys()
    assert len(grads) == 3 * 7 * 2
    assert max(_error(again[name], grads[name]) for name in grads) < 1e-4


def test_layers_need_not_have_the_same_ranks():
    """A gradient leaves with room for the ranks of its own layer; the one below may have others."""
    ranks = {"layers.1.mlp.down_proj": 9, "layers.2.self_attn.o_proj": 17}
    model = _model(rank_pattern=ranks)
    body = model.get_base_model().model
    ids, weight = torch.randint(0, 96, (1, 11)), torch.randn(1, 11, 128)
    grads = _gradients(model, body(input_ids=ids, use_cache=False)[0], weight)
    fused = FusedBody(body)
    assert [layer.into.room for layer in fused.layers] == [8, 16, 8]
    again = _gradients(model, fused(ids)[0], weight)
    assert again.keys() == grads.keys()
    assert max(_error(again[name], grads[name]) for name in grads) < 1e-4


def test_bf16_error_is_within_twice_that_of_transformers():
    model = _model()
    body = model.get_base_model().model
    ids = torch.randint(0, 96, (2, 33))
    weight = torch.randn(2, 33, 128)
    exact = _gradients(model, body(input_ids=ids, use_cache=False)[0], weight)
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        if "lora" not in name:
            parameter.data = (
                parameter.data.bfloat16() if parameter.is_floating_point() else parameter.data
            )
    half_body = half.get_base_model().model
    theirs = _gradients(half, half_body(input_ids=ids, use_cache=False)[0], weight)
    ours = _gradients(half, FusedBody(half_body, memory="fast")(ids)[0], weight)
    for name, grad in exact.items():
        assert _error(ours[name], grad) < 2 * _error(theirs[name], grad) + 1e-3, name


def test_packed_documents_equal_each_alone():
    model = _model()
    fused = FusedBody(model.get_base_model().model, memory="fast")
    lengths = [5, 1, 11]
    documents = [torch.randint(0, 96, (1, n)) for n in lengths]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
    hidden = fused(packed, positions, Layout(1, 17, bounds, 11))[0]
    alone = torch.cat([fused(document)[0] for document in documents], 1)
    assert _error(hidden, alone) < 1e-5


def test_a_dense_base_and_partly_adapted_layers_work_too():
    model = _model(quantized=False, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3})
    body = model.get_base_model().model
    ids = torch.randint(0, 96, (1, 9))
    weight = torch.randn(1, 9, 128)
    grads = _gradients(model, body(input_ids=ids, use_cache=False)[0], weight)
    again = _gradients(model, FusedBody(body, memory="lean")(ids)[0], weight)
    assert len(grads) == 3 * 2 * 2
    assert max(_error(again[name], grads[name]) for name in grads) < 1e-4


def test_an_unknown_memory_setting_is_refused():
    body = _model().get_base_model().model
    with pytest.raises(ConfigError, match="auto"):
        FusedBody(body, memory="huge")


@pytest.mark.parametrize("memory", ["fast", "lean", 40_000])
def test_dropout_gradients_are_those_of_the_masks_that_the_forward_drew(memory):
    """Finite differences in float64: whatever the masks are, both passes must use the same."""
    model = _model(quantized=False, dtype=torch.float64, lora_dropout=0.3).double().train()
    fused = FusedBody(model.get_base_model().model, memory=memory)
    ids = torch.randint(0, 96, (1, 7))
    weight = torch.randn(1, 7, 128, dtype=torch.float64)

    def loss():
        torch.manual_seed(5)
        return (fused(ids)[0] * weight).sum()

    model.zero_grad()
    value = loss()
    value.backward()
    torch.manual_seed(6)
    assert fused(ids)[0].mul(weight).sum().item() != pytest.approx(value.item(), rel=1e-6)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name in ("layers.0.self_attn.q_proj.lora_A", "layers.1.self_attn.o_proj.lora_A",
                 "layers.1.mlp.up_proj.lora_A", "layers.0.mlp.down_proj.lora_A",
                 "layers.0.mlp.down_proj.lora_B"):  # fmt: skip
        parameter = next(p for n, p in named.items() if name in n)
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 2e-3 * direction
            up = loss()
            parameter -= 4e-3 * direction
            down = loss()
            parameter += 2e-3 * direction
        slope = ((up - down) / 4e-3).item()
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=5e-3)


def test_nothing_is_dropped_in_evaluation():
    model = _model(lora_dropout=0.5).eval()
    body = model.get_base_model().model
    ids = torch.randint(0, 96, (1, 7))
    with torch.no_grad():
        assert _error(FusedBody(body)(ids)[0], body(ids, use_cache=False)[0]) < 1e-5


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_weights_that_stay_change_no_gradient_of_any_step(memory):
    model = _model()
    fused = FusedBody(model.get_base_model().model, memory=memory)
    ids, weight = torch.randint(0, 96, (2, 17)), torch.randn(2, 17, 128)
    steps = []
    for granted in (False, True):
        for layer in fused.layers[:2]:
            for siblings in layer.all_siblings:
                siblings.stay.granted = granted
        state = copy.deepcopy(model.state_dict())
        for _ in range(3):  # adapters change between steps, so borders must follow
            steps.append(_gradients(model, fused(ids)[0], weight))
            with torch.no_grad():
                for name, gradient in steps[-1].items():
                    model.get_parameter(name).sub_(0.01 * gradient)
        model.load_state_dict(state)
    assert fused.layers[0].qkv.stay.matrix is not None
    for plain, staying in zip(steps[:3], steps[3:], strict=True):
        for name, gradient in plain.items():
            assert torch.equal(staying[name], gradient), name


class _LateOffload(Offload):
    """Copies happen only when somebody waits for them, and memory that is let go is spoiled."""

    def __init__(self):
        super().__init__(torch.device("cpu"), piece_bytes=1000)
        self.queue, self.done, self.sent = [], 0, []

    def copy(self, x, pieces, *, is_leaving):
        if is_leaving:
            self.sent.append(x)
        else:
            x.fill_(nan)
        self.queue.append(lambda: Offload.copy(self, x, pieces, is_leaving=is_leaving))
        return len(self.queue)

    def wait(self, event):
        for queued in self.queue[self.done : event]:
            queued()
        self.done = max(self.done, event)
        while self.sent:
            self.sent.pop().fill_(nan)


LORAS = [{}, {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1, 2]}]


@pytest.mark.parametrize("lora", LORAS)
def test_inputs_that_leave_for_the_host_change_no_gradient(monkeypatch, lora):
    """As on a GPU, where host and device are two memories and copies take their time."""
    model = _model(lora_dropout=0.2, **lora).train()
    ids, weight = torch.randint(0, 96, (2, 17)), torch.randn(2, 17, 128)
    found = {}
    for levels in (["input"] * 3, ["offload"] * 3, ["offload", "offload", "attention"]):
        fused = FusedBody(model.get_base_model().model, memory="lean")
        fused._offload, choice = _LateOffload(), policy.Choice(levels)
        monkeypatch.setattr(fused, "choose", lambda *_, c=choice: c)
        for step in range(2):
            torch.manual_seed(step)
            found[tuple(levels), step] = _gradients(model, fused(ids)[0], weight)
        assert fused._offload.done == len(fused._offload.queue)
    for (levels, step), grads in found.items():
        right = found[("input",) * 3, step]
        assert grads.keys() == right.keys()
        for name, gradient in grads.items():
            assert torch.equal(gradient, right[name]), (levels, name)


def test_tiles_are_taken_where_memory_is_short():
    fused = FusedBody(_model().get_base_model().model, memory="lean")
    tokens = 4096
    chosen = [fused.choose(tokens, 2, free).tile for free in range(0, 40 * 10**6, 10**6)]
    assert list(dict.fromkeys(chosen)) == [512, 1024, 0]
    assert fused.choose(tokens, 2, 10**9, 0).levels == ["input"] * 3
    assert fused.choose(tokens, 2, 10**9).levels == ["offload", "offload", "input"]
    assert fused.smaller_tile(tokens) == 2048
    smaller = fused.with_memory("lean", max_tile=2048)
    assert smaller.choose(tokens, 2, 10**9).tile == 2048
    assert smaller.smaller_tile(tokens) == 1024
    assert smaller.smaller_tile(512) is None


def test_a_trained_final_norm_is_not_recorded():
    body = _model().get_base_model().model
    assert not FusedBody(body)._graphs.is_stopped
    body.norm.weight.requires_grad_()
    fused = FusedBody(body)
    assert fused._graphs.is_stopped
    assert fused.with_memory("lean")._graphs.is_stopped


def test_attention_is_computed_again_by_the_backend_that_computed_it(monkeypatch):
    """Another backend saves other tensors, which checkpointing refuses."""
    inside, calls = [], []

    @contextlib.contextmanager
    def preference():
        inside.append(True)
        yield
        inside.pop()

    def attention(*arguments):
        calls.append(bool(inside))
        return plain_attention(*arguments)

    monkeypatch.setattr("halfbyte.engine.body.backends", preference)
    monkeypatch.setattr("halfbyte.engine.layer.backends", preference)
    monkeypatch.setattr("halfbyte.engine.layer.attention", attention)
    body = _model().get_base_model().model
    FusedBody(body, memory="lean")(torch.randint(0, 96, (1, 9)))[0].sum().backward()
    assert calls == [True] * 6  # three layers, twice
