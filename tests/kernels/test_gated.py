import pytest
import torch
from torch.nn import functional as F

from halfbyte.kernels import gated
from halfbyte.kernels.dropout import Mask, add_masked_product_, dropout, kept

SHAPES = [(1, 1), (3, 63), (5, 128), (2, 1100), (130, 40)]


def _reference(gate_up, size, activation):
    gate, up = gate_up[:, :size], gate_up[:, size : 2 * size]
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


def _error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_autograd_in_float64(shape, activation):
    tokens, size = shape
    torch.manual_seed(0)
    gate_up = torch.randn(tokens, 2 * size + 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(tokens, size, dtype=torch.float64)
    expected = _reference(gate_up, size, activation)
    (expected_grad,) = torch.autograd.grad(expected, gate_up, grad)
    actual = gated.gated_forward(gate_up.detach(), size, activation, columns=7)
    assert actual.shape == (tokens, size + 7)
    assert _error(actual[:, :size], expected.detach()) < 1e-12
    buffer = gate_up.detach().clone()
    border = buffer[:, 2 * size :].clone()
    xa, gb = torch.randn(tokens, 5, dtype=torch.float64), torch.randn(tokens, 2).double()
    xas = xa.split([3, 2], 1)
    grads = gated.gated_backward_(buffer, grad, xas, gb, size, activation)
    assert _error(buffer[:, : 2 * size], expected_grad[:, : 2 * size]) < 1e-12
    assert torch.equal(buffer[:, 2 * size :], border)
    assert _error(grads[0], expected_grad[:, :size].t() @ xas[0]) < 1e-12
    assert _error(grads[1], expected_grad[:, size : 2 * size].t() @ xas[1]) < 1e-12
    assert _error(grads[2], gb.t() @ expected.detach()) < 1e-12


@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_twin_equals_the_reference(shape, activation, triton_device, half_dtype):
    twin = pytest.importorskip("halfbyte.kernels.gated_triton")
    tokens, size = shape
    torch.manual_seed(0)
    gate_up = torch.randn(tokens, 2 * size + 8, device=triton_device).to(half_dtype)
    grad = torch.randn(tokens, size, device=triton_device).to(half_dtype)
    expected = gated.gated_forward.__wrapped__(gate_up.double(), size, activation)
    actual = twin.gated_forward(gate_up, size, activation, columns=8)
    assert _error(actual[:, :size], expected) < 4e-3
    xa, gb = (torch.randn(tokens, n, device=triton_device).to(half_dtype) for n in (28, 8))
    xas = xa.split([16, 12], 1)
    wanted = gate_up.double()
    expected_grads = gated.gated_backward_.__wrapped__(
        wanted, grad.double(), [t.double() for t in xas], gb.double(), size, activation
    )
    result = gate_up.clone()
    grads = twin.gated_backward_(result, grad, xas, gb, size, activation)
    assert _error(result[:, : 2 * size], wanted[:, : 2 * size]) < 4e-3
    assert torch.equal(result[:, 2 * size :], gate_up[:, 2 * size :])
    for actual_grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert actual_grad.shape == expected_grad.shape
        assert _error(actual_grad, expected_grad) < 8e-3


def _gated_dropout(kernel, gate_up, grad, xa, gb, lora_A, mask):
    """Return the gradient of gate and up, and down's of A."""
    result = gate_up.clone()
    grads = kernel(result, grad.clone(), (xa, xa), gb, grad.shape[1], "silu", mask, lora_A)
    return result[:, : 2 * grad.shape[1]], grads[2]


@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (130, 40)])
def test_dropout_before_down_is_in_both_gradients(shape, triton_device, half_dtype):
    twin = pytest.importorskip("halfbyte.kernels.gated_triton")
    tokens, size = shape
    torch.manual_seed(0)
    mask = Mask(0.3, torch.tensor([9, 4], device=triton_device), 5)
    shapes = ((tokens, 2 * size), (tokens, size), (tokens, 4), (tokens, 8), (8, size))
    inputs = [torch.randn(s, device=triton_device).to(half_dtype) for s in shapes]
    gate_up, grad, xa, gb, lora_A = (t.double() for t in inputs)
    leaf = gate_up.clone().requires_grad_()
    hidden = _reference(leaf, size, "silu")
    total = add_masked_product_(grad.clone(), gb, lora_A, mask)
    (expected,) = torch.autograd.grad(hidden, leaf, total)
    read = torch.where(kept(mask, tokens, size), hidden.detach() * mask.scale, 0)
    cases = (
        (gated.gated_backward_.__wrapped__, [gate_up, grad, xa, gb, lora_A], 1e-12),
        (twin.gated_backward_, inputs, 8e-3),
    )
    for kernel, arguments, tolerance in cases:
        actual, grad_A = _gated_dropout(kernel, *arguments, mask)
        assert _error(actual, expected) < tolerance
        assert _error(grad_A, gb.t() @ read) < tolerance


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 8), (7, 72, 48), (70, 40, 16), (0, 8, 8), (3, 8, 0)])
def test_forward_with_the_product_of_down(shape, drops, triton_device, half_dtype):
    twin = pytest.importorskip("halfbyte.kernels.gated_triton")
    tokens, size, rank = shape
    torch.manual_seed(0)
    mask = Mask(0.3, torch.tensor([9, 4], device=triton_device), 5) if drops else None
    gate_up = torch.randn(tokens, 2 * size + 8, device=triton_device).to(half_dtype)
    lora_A = torch.randn(rank, size + 8, device=triton_device).to(half_dtype)[:, :size]
    hidden = _reference(gate_up.double(), size, "silu")
    read = hidden if mask is None else dropout(hidden, mask)
    for kernel in (gated.gated_product.__wrapped__, twin.gated_product):
        out, xa = kernel(gate_up, size, "silu", lora_A, scaling=0.5, mask=mask)
        assert out.shape == (tokens, size + rank)
        assert torch.equal(xa, out[:, size:] * 0.5)
        for actual, expected in ((out[:, :size], hidden), (xa * 2, read @ lora_A.double().t())):
            assert (actual.double() - expected).norm() <= 4e-3 * expected.norm()


def test_tiles_of_many_tokens_serve_too(triton_device, half_dtype, monkeypatch):
    twin = pytest.importorskip("halfbyte.kernels.gated_triton")
    monkeypatch.setattr(twin, "FEW_TOKENS", 0)
    test_dropout_before_down_is_in_both_gradients((70, 40), triton_device, half_dtype)
    test_forward_with_the_product_of_down((70, 40, 16), True, triton_device, half_dtype)


def test_no_adapters_and_no_tokens_are_fine(triton_device, half_dtype):
    twin = pytest.importorskip("halfbyte.kernels.gated_triton")
    for tokens in (0, 3):
        gate_up = torch.randn(tokens, 20, device=triton_device).to(half_dtype)
        none = torch.empty(tokens, 0, device=triton_device).to(half_dtype)
        grad = torch.randn(tokens, 10, device=triton_device).to(half_dtype)
        grads = twin.gated_backward_(gate_up, grad, (none, none), none, 10, "silu")
        assert [tuple(g.shape) for g in grads] == [(10, 0), (10, 0), (0, 10)]
