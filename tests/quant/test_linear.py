import copy

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from halfbyte.quant.linear import NF4Linear


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return nn.Linear(128, 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_and_gradients_equal_bitsandbytes(dense, dtype):
    dense = dense.to(dtype)
    ours = NF4Linear.from_linear(dense)
    theirs = bnb.nn.Linear4bit(128, 96, compute_dtype=dtype, quant_type="nf4")
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    inputs = [torch.randn(5, 7, 128).to(dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [ours(inputs[0]), theirs(inputs[1])]
    for output in outputs:
        (output * torch.arange(96)).sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_gradient_equals_a_float64_reference(dense):
    ours = NF4Linear.from_linear(dense)
    x = torch.randn(3, 128, requires_grad=True)
    ours(x).square().sum().backward()
    weight = ours.dequantize().double()
    reference = x.detach().double().requires_grad_()
    (reference @ weight.T + dense.bias.double()).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)


def test_trains_its_bias_when_asked(dense):
    ours = NF4Linear.from_linear(dense)
    ours.bias.requires_grad_()
    ours(torch.ones(2, 5, 128)).sum().backward()
    assert torch.equal(ours.bias.grad, torch.full((96,), 10.0))
    assert ours.weight.grad is None


def test_keeps_no_dense_weight_for_the_backward_pass(dense):
    ours = NF4Linear.from_linear(dense)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(torch.randn(1, 128, requires_grad=True))
    assert saved
    assert max(tensor.nbytes for tensor in saved) < dense.weight.nbytes / 4


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_works_under_gradient_checkpointing(dense, use_reentrant):
    ours = NF4Linear.from_linear(dense)
    x = torch.randn(4, 128, requires_grad=True)
    checkpoint(ours, x, use_reentrant=use_reentrant).square().sum().backward()
    direct = x.detach().clone().requires_grad_()
    ours(direct).square().sum().backward()
    assert torch.equal(x.grad, direct.grad)


def test_compute_dtype_is_kept_inside(dense):
    ours = NF4Linear.from_linear(dense, compute_dtype=torch.bfloat16)
    x = torch.randn(4, 128)
    assert ours(x).dtype == torch.float32
    expected = nn.functional.linear(
        x.bfloat16(), ours.dequantize(torch.bfloat16), dense.bias.bfloat16()
    )
    assert torch.equal(ours(x), expected.float())


def test_autocast_gives_its_own_dtype(dense):
    ours = NF4Linear.from_linear(dense)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(4, 128)).dtype == torch.bfloat16


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_casting_a_model_leaves_codes_and_scales(dense, cast):
    ours = NF4Linear.from_linear(dense)
    before = ours.dequantize()
    cast(nn.Sequential(ours))
    assert ours.bias.dtype.itemsize == 2
    assert torch.equal(ours.dequantize(), before)
    assert {t.dtype for t in ours.quantized.tensors().values()} == {torch.uint8, torch.float32}


def test_deepcopy_shares_nothing(dense):
    ours = NF4Linear.from_linear(dense)
    twin = copy.deepcopy(ours)
    before = ours.dequantize()
    twin.weight.zero_()
    twin.absmax.zero_()
    assert torch.equal(ours.dequantize(), before)


def test_state_dict_has_bitsandbytes_names_and_bytes(dense):
    theirs = bnb.nn.Linear4bit(128, 96, compute_dtype=torch.float32, quant_type="nf4")
    theirs.load_state_dict(dense.state_dict())
    expected = theirs.to("cpu").state_dict()
    found = NF4Linear.from_linear(dense).state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_survives_a_safetensors_file(dense, tmp_path, double_quant):
    ours = nn.Sequential(NF4Linear.from_linear(dense, double_quant=double_quant))
    save_file(ours.state_dict(), tmp_path / "layer.safetensors")
    again = nn.Sequential(NF4Linear(128, 96))
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(2, 128)
    assert torch.equal(again(x), ours(x))


def test_loading_a_damaged_state_says_what_is_wrong(dense):
    state = NF4Linear.from_linear(dense).state_dict()
    state["weight.absmax"] = state["weight.absmax"][:-1]
    with pytest.raises(RuntimeError, match="absmax"):
        NF4Linear(128, 96).load_state_dict(state)


def test_loading_without_the_weight_is_strict(dense):
    state = {"bias": dense.bias.detach()}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        NF4Linear(128, 96).load_state_dict(state)


def test_torch_compile_traces_it_whole(dense):
    ours = NF4Linear.from_linear(dense)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 128, requires_grad=True)
    output = compiled(x)
    assert torch.equal(output, ours(x))
    output.sum().backward()
    assert x.grad is not None
