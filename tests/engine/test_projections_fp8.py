import dataclasses
import logging

import pytest
import torch

from halfbyte.engine.projections import Projection, Siblings, Stay, pairs
from halfbyte.engine.projections_fp8 import (
    Fp8Siblings,
    fp8_siblings,
    require_bfloat16,
    require_fp8,
)
from halfbyte.errors import ConfigError
from halfbyte.kernels.dropout import dropout
from halfbyte.quant.weight import QuantizedWeight

K, SEED = 256, torch.tensor([1, 2])


def _group(*, ranks=(8, 0, 4), scalings=(0.5, 1.0, 2.0), bias=False, base=0.02, b=0.02, **settings):
    torch.manual_seed(0)
    projections = []
    for outputs, rank, scaling in zip((64, 32, 48), ranks, scalings, strict=True):
        weight = torch.randn(outputs, K, dtype=torch.float64) * base
        if base:
            weight = QuantizedWeight.quantize(weight.float())
        adapter = [None, None]
        if rank:
            adapter = [torch.rand(rank, K) / 8 - 1 / 16, torch.randn(outputs, rank) * b]
            adapter = [torch.nn.Parameter(t.double()) for t in adapter]
        own_bias = torch.randn(outputs, dtype=torch.float64) if bias else None
        projections.append(Projection(weight, own_bias, *adapter, scaling))
    return Fp8Siblings(tuple(projections), **settings)


def _exact(plain_outputs, group, x, grad, seed):
    """Return outputs and all gradients as autograd has them in float64."""
    mask = group.mask(seed)
    y = plain_outputs(group, x, x if mask is None else dropout(x, mask))
    return [y, *torch.autograd.grad(y, [x, *group.adapters], grad)]


@torch.no_grad()
def _run(group, x, grad, seed):
    """Return the same as the engine makes them."""
    tokens = x.shape[0]
    x_wide = torch.full((tokens, K + group.rank), torch.nan, dtype=x.dtype)
    x_wide[:, :K] = x
    wide = group.wide(x_wide)
    xa = group.down_(x_wide, wide, seed)
    y = group.forward(x_wide, wide, x.new_empty(tokens, group.outputs + 8)[:, : group.outputs])
    grad_wide = torch.full((tokens, group.outputs + group.rank), torch.nan, dtype=x.dtype)
    grad_wide[:, : group.outputs] = grad
    wide = group.wide_again(x_wide)
    group.up_(grad_wide, wide)
    grad_x = group.backward_input(grad_wide, wide, seed)
    grads_A = group.grad_A_(grad_wide, wide, x.detach(), seed, grad_x)
    return [y, grad_x, *pairs(grads_A, group.grad_B(grad_wide, xa))]


def _errors(plain_outputs, group, tokens=7, seed=None):
    x = torch.randn(tokens, K, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(tokens, group.outputs, dtype=torch.float64)
    expected, actual = _exact(plain_outputs, group, x, grad, seed), _run(group, x, grad, seed)
    assert len(actual) == len(expected)
    return [
        ((one - other).norm() / other.norm().clamp_min(1e-30)).item()
        for one, other in zip(actual, expected, strict=True)
    ]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"bias": True},
        {"ranks": (0, 0, 0)},
        {"ranks": (8, 8, 8), "scalings": (2.0, 2.0, 2.0)},
        {"b": 0.0},
        {"b": 1e-6},
        {"b": 1.0},
    ],
    ids=str,
)
def test_products_are_those_of_three_bits_and_adapters_gradients_exact(plain_outputs, case, p):
    output, grad_x, *adapters = _errors(plain_outputs, _group(**case, dropout=p), seed=SEED)
    assert 0.005 < output < 0.045
    assert 0.005 < grad_x < 0.045
    assert all(error < 1e-6 for error in adapters)


@pytest.mark.parametrize("b", [1e-4, 0.02, 1.0])
def test_loras_share_is_as_good_as_in_bf16(plain_outputs, b):
    """Where the base is zero, only LoRA is left."""
    output, grad_x, *_ = _errors(plain_outputs, _group(base=0.0, b=b))
    assert output < 0.01
    assert grad_x < 0.01


@pytest.mark.parametrize("kind", [Siblings, Fp8Siblings])
@torch.no_grad()
def test_what_has_no_border_gives_the_same(kind):
    group = kind(_group().projections, dropout=0.3)
    x_wide = torch.randn(7, K + group.rank, dtype=torch.float64)
    x, wide = x_wide[:, :K].clone(), group.wide(x_wide)
    xa = group.down_(x_wide, wide, SEED)
    expected = group.forward(x_wide, wide, x.new_empty(7, group.outputs))
    out = torch.empty_like(expected)
    found = group.forward_alone(x, wide, SEED, out)
    assert found[0] is out
    assert torch.equal(out, expected)
    assert torch.equal(found[1], xa)


def test_rows_far_apart_in_size_are_as_good_as_others(plain_outputs):
    group = _group()
    x = torch.randn(9, K, dtype=torch.float64) * torch.logspace(-8, 8, 9).unsqueeze(1).double()
    x.requires_grad_()
    grad = torch.randn(9, group.outputs, dtype=torch.float64) * 1e-9
    expected, actual = _exact(plain_outputs, group, x, grad, None)[0], _run(group, x, grad, None)[0]
    errors = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 0.05


def test_no_tokens_are_fine(plain_outputs):
    assert _errors(plain_outputs, _group(), tokens=0)[0] == 0
    assert _errors(plain_outputs, _group(), tokens=1)[0] < 0.06


def test_what_stays_gives_the_same_and_follows_the_adapters():
    group = _group()
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, group.outputs, dtype=torch.float64)
    passing = _run(group, x, grad, None)
    assert group.stay.nbytes == 0
    group.stay.granted = True
    for _ in range(2):
        staying = _run(group, x, grad, None)
        assert all(torch.equal(*pair) for pair in zip(passing, staying, strict=True))
    assert group.stay.nbytes == group.staying_bytes(8)
    kept = group.stay.matrix, group.stay.transposed
    with torch.no_grad():
        for adapter in group.adapters:
            adapter.mul_(-2)
    changed = _run(group, x, grad, None)
    assert (group.stay.matrix, group.stay.transposed) == kept
    again = _run(dataclasses.replace(group, stay=Stay()), x, grad, None)
    assert all(torch.equal(*pair) for pair in zip(changed, again, strict=True))
    assert not torch.equal(changed[0], passing[0])
    group.stay.end()
    assert group.stay.nbytes == 0


def test_matrices_granted_in_the_middle_of_a_step_follow_the_adapters():
    """Then the backward's is there before the forward's."""
    group = _group()
    x = torch.randn(5, K + group.rank, dtype=torch.float64)
    grad = torch.randn(5, group.outputs + group.rank, dtype=torch.float64)
    group.stay.granted = True
    group.backward_input(grad, group.wide(x), None)
    with torch.no_grad():
        for adapter in group.adapters:
            adapter.mul_(-2)
    for _ in range(2):
        found = _run(group, x[:, :K], grad[:, : group.outputs], None)
        again = _run(
            dataclasses.replace(group, stay=Stay()), x[:, :K], grad[:, : group.outputs], None
        )
        assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    assert group.stay.nbytes == group.staying_bytes(8)


def test_other_sizes_stay_in_sixteen_bits_and_that_is_said_once(caplog):
    odd = (Projection(torch.randn(24, 40)),)
    with caplog.at_level(logging.WARNING):
        kinds = [type(fp8_siblings(odd, 0.0, salt)) for salt in range(2)]
    assert kinds == [Siblings, Siblings]
    assert caplog.text.count("40 to 24") == 1
    assert type(fp8_siblings((Projection(torch.randn(32, 48)),), 0.1, 3)) is Fp8Siblings


def test_a_cpu_is_refused():
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 .* got cpu") as error:
        require_fp8(torch.device("cpu"))
    assert "bf16" in error.value.hint


def test_an_older_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ConfigError, match=r"A100, 8\.0"):
        require_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    require_fp8(torch.device("cuda"))


def test_another_dtype_is_refused():
    require_bfloat16(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"in bfloat16, got torch\.float16"):
        require_bfloat16(torch.float16)
