import copy

import peft
import pytest
import torch
from torch import nn

from halfbyte.adapters import layer as layer_module
from halfbyte.adapters.inject import LoraConfig, add_lora
from halfbyte.adapters.layer import LoraLinear
from halfbyte.errors import AdapterError
from halfbyte.quant.linear import NF4Linear

IN, OUT = 64, 48


class Two(nn.Module):
    """A model of one linear layer, dense or in 4 bits."""

    def __init__(self, *, is_4bit, bias, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        linear = nn.Linear(IN, OUT, bias=bias).to(dtype)
        self.proj = NF4Linear.from_linear(linear, compute_dtype=dtype) if is_4bit else linear

    def forward(self, x, **kwargs):
        return self.proj(x, **kwargs)


@pytest.fixture(params=[True, False], ids=["4bit", "dense"])
def is_4bit(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def model(request, is_4bit):
    return Two(is_4bit=is_4bit, bias=request.param)


def settings(**changes):
    return {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["proj"],
        "task_type": "FEATURE_EXTRACTION",
    } | changes


def adapted(model, randomize, config_class=LoraConfig, **changes):
    config = config_class(**settings(**changes))
    return randomize(peft.inject_adapter_in_model(config, model))


def twin(model, randomize, **changes):
    """The same model adapted by peft's own layer, with the same adapters."""
    return adapted(copy.deepcopy(model), randomize, config_class=peft.LoraConfig, **changes)


def gradients(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    parameters = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y, {"x": x.grad, **parameters}


@pytest.fixture
def calls(monkeypatch):
    """Counts the fast path's calls."""
    made = []
    real = layer_module.lora_linear

    def count(*args, **kwargs):
        made.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(layer_module, "lora_linear", count)
    return made


def close(a, b, tolerance=0.02):
    return (a.float() - b.float()).norm() <= tolerance * b.float().norm() + 1e-6


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"proj": 7}}])
def test_fast_path_agrees_with_pefts_layer(model, randomize, calls, changes):
    theirs, ours = twin(model, randomize, **changes), adapted(model, randomize, **changes)
    assert type(ours.proj) is LoraLinear
    assert type(theirs.proj) is peft.tuners.lora.Linear
    x = torch.randn(3, 5, IN, dtype=torch.bfloat16)
    y, grads = gradients(ours, x)
    want, want_grads = gradients(theirs, x)
    assert len(calls) == 1
    assert y.dtype == want.dtype
    assert close(y, want)
    assert grads.keys() == want_grads.keys()
    assert all(grads[name].dtype == want_grads[name].dtype for name in grads)
    assert all(close(grads[name], want_grads[name]) for name in grads)


def two_adapters(model, randomize, config_class):
    model = adapted(model, randomize, config_class=config_class)
    model = peft.inject_adapter_in_model(
        config_class(**settings(r=3)), model, adapter_name="second"
    )
    return randomize(model, seed=1)


class TestGeneralPath:
    """What the fast path cannot do is peft's, and right on the 4-bit weight too."""

    def check(self, ours, theirs, calls, x, *, tolerance=0.02, **kwargs):
        assert close(ours(x, **kwargs), theirs(x, **kwargs), tolerance)
        assert not calls

    @pytest.fixture
    def x(self):
        return torch.randn(3, 5, IN, dtype=torch.bfloat16)

    def test_several_active_adapters(self, model, randomize, calls, x):
        theirs = two_adapters(copy.deepcopy(model), randomize, peft.LoraConfig)
        ours = two_adapters(model, randomize, LoraConfig)
        for both in (ours, theirs):
            both.proj.set_adapter(["default", "second"])
        self.check(ours, theirs, calls, x)

    def test_batches_with_different_adapters(self, model, randomize, calls, x):
        theirs = two_adapters(copy.deepcopy(model), randomize, peft.LoraConfig).eval()
        ours = two_adapters(model, randomize, LoraConfig).eval()
        self.check(ours, theirs, calls, x, adapter_names=["default", "__base__", "second"])

    def test_lora_bias(self, randomize, is_4bit, calls, x):
        model = Two(is_4bit=is_4bit, bias=True)
        theirs = twin(model, randomize, lora_bias=True)
        self.check(adapted(model, randomize, lora_bias=True), theirs, calls, x)

    def test_disabled_adapters(self, model, randomize, calls, x):
        base = model(x)
        ours = adapted(model, randomize)
        ours.proj.enable_adapters(False)
        assert torch.equal(ours(x), base)
        assert not calls

    def test_hooks_on_the_inner_modules_run(self, model, randomize, calls, x):
        ours = adapted(model, randomize)
        seen = []
        ours.proj.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
        ours(x)
        assert seen
        assert not calls

    def test_dora_is_computed_on_the_dequantized_weight(self, model, randomize, calls, x):
        dense = Two(is_4bit=False, bias=model.proj.bias is not None)
        dense.proj.bias = model.proj.bias
        if isinstance(model.proj, NF4Linear):
            dense.proj.weight = nn.Parameter(model.proj.dequantize())
        theirs = twin(dense, randomize, use_dora=True)
        ours = adapted(model, randomize, use_dora=True)
        self.check(ours, theirs, calls, x)
        got, want = gradients(ours, x)[1], gradients(theirs, x)[1]
        adapters = [name for name in want if "lora_" in name or name == "x"]
        assert any("magnitude" in name for name in adapters)
        assert all(close(got[name], want[name], 0.03) for name in adapters)


def test_switching_between_adapters_keeps_the_fast_path(model, randomize, calls):
    ours = two_adapters(model, randomize, LoraConfig)
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    ours.proj.set_adapter("default")
    first = ours(x)
    ours.proj.set_adapter("second")
    second = ours(x)
    assert len(calls) == 2
    assert not torch.equal(first, second)


def test_dropout_only_while_training(model, randomize, calls):
    ours = adapted(model, randomize, lora_dropout=0.5)
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    torch.manual_seed(0)
    first = ours(x)
    second = ours(x)
    torch.manual_seed(0)
    assert torch.equal(ours(x), first)
    assert not torch.equal(first, second)
    ours.eval()
    assert torch.equal(ours(x), ours(x))
    assert len(calls) == 5


def test_autocast_follows_the_base_layer(is_4bit, randomize, calls):
    model = Two(is_4bit=is_4bit, bias=True, dtype=torch.float32)
    x = torch.randn(4, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base_dtype = model(x).dtype
        y = adapted(model, randomize)(x)
    assert y.dtype == base_dtype == torch.bfloat16
    assert len(calls) == 1


def test_float32_activations_come_back_in_float32(randomize):
    """As after `prepare_model_for_kbit_training`, which makes norms and residuals float32."""
    model = Two(is_4bit=True, bias=True)
    theirs = twin(model, randomize)
    ours = adapted(model, randomize)
    x = torch.randn(4, IN)
    assert ours(x).dtype == torch.float32
    assert close(ours(x), theirs(x))


def test_compiles_without_a_graph_break(model, randomize):
    ours = adapted(model, randomize)
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    y, grads = gradients(ours, x)
    ours.zero_grad()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    y_compiled, grads_compiled = gradients(compiled, x)
    assert close(y_compiled, y)
    names = {name.removeprefix("_orig_mod."): grad for name, grad in grads_compiled.items()}
    assert all(close(names[name], grads[name]) for name in grads)


class TestMerge:
    def test_into_a_dense_weight_is_pefts(self, randomize):
        model = Two(is_4bit=False, bias=True)
        theirs = twin(model, randomize)
        ours = adapted(model, randomize)
        ours.proj.merge()
        theirs.proj.merge()
        assert torch.equal(ours.proj.base_layer.weight, theirs.proj.base_layer.weight)
        x = torch.randn(4, IN, dtype=torch.bfloat16)
        assert torch.equal(ours(x), theirs(x))
        ours.proj.unmerge()
        assert not ours.proj.merged

    @pytest.mark.parametrize("safe", [True, False])
    def test_into_four_bits_is_refused_and_changes_nothing(self, randomize, safe):
        ours = adapted(Two(is_4bit=True, bias=True), randomize)
        x = torch.randn(4, IN, dtype=torch.bfloat16)
        before = ours(x)
        with pytest.raises(AdapterError, match="halfbyte merge"):
            ours.proj.merge(safe_merge=safe)
        assert torch.equal(ours(x), before)

    def test_unmerged_model_unloads_to_its_base(self, load, randomize, input_ids):
        base = load()
        want = base(input_ids).logits
        model = randomize(add_lora(base))
        assert not torch.equal(model(input_ids).logits, want)
        assert torch.equal(model.unload()(input_ids).logits, want)


def test_survives_deepcopy(model, randomize):
    ours = adapted(model, randomize)
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    clone = copy.deepcopy(ours)
    assert torch.equal(clone(x), ours(x))
    clone.proj.lora_B["default"].weight.data.zero_()
    assert not torch.equal(clone(x), ours(x))
