import pytest
import torch

from halfbyte.kernels import head_norm

# Tokens, normed heads, heads beside them, head size.
SHAPES = [(1, 1, 0, 1), (3, 5, 2, 63), (4, 9, 1, 128), (2, 3, 3, 100)]
EPS = 1e-6


def _inputs(shape, dtype):
    tokens, heads, others, size = shape
    torch.manual_seed(0)
    x, grad = torch.randn(2, tokens, heads + others, size, dtype=torch.float64).to(dtype)
    return x[:, :heads], grad[:, :heads], 1 + 0.1 * torch.randn(heads, size)


def _formula(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_autograd_in_float64(shape):
    x, grad, weight = _inputs(shape, torch.float64)
    leaf = x.clone().requires_grad_()
    expected = _formula(leaf, weight.double())
    torch.testing.assert_close(head_norm.head_norm(x, weight, EPS), expected.detach())
    (wanted,) = torch.autograd.grad(expected, leaf, grad)
    actual = head_norm.head_norm_backward_(grad, x, weight, EPS)
    assert actual is grad
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_twin_equals_the_reference_and_leaves_other_heads_alone(
    shape, triton_device, half_dtype
):
    twin = pytest.importorskip("halfbyte.kernels.head_norm_triton")
    x, grad, weight = _inputs(shape, half_dtype)
    x, grad, weight = x.to(triton_device), grad.to(triton_device), weight.to(triton_device)
    expected = head_norm.head_norm.__wrapped__(x, weight, EPS)
    torch.testing.assert_close(twin.head_norm(x, weight, EPS), expected, rtol=8e-3, atol=1e-2)
    wanted = head_norm.head_norm_backward_.__wrapped__(grad.clone(), x, weight, EPS)
    buffer = torch.full((*grad.shape[:1], grad.shape[1] + 2, grad.shape[2]), 7.0).to(grad)
    own = buffer[:, :-2]
    own.copy_(grad)
    twin.head_norm_backward_(own, x, weight, EPS)
    torch.testing.assert_close(own, wanted, rtol=8e-3, atol=1e-2)
    assert (buffer[:, -2:] == 7).all()
