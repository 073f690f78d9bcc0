import pytest
import torch

from halfbyte.kernels import rms_norm

SHAPES = [(1, 1), (3, 63), (5, 128), (7, 200)]


def _inputs(shape, dtype, seed=0):
    torch.manual_seed(seed)
    x, delta, grad, beside = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    weight = 1 + 0.1 * torch.randn(shape[1], dtype=torch.float32)
    return [t.to(dtype) for t in (x, delta, grad, beside)], weight


def _norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_autograd_in_float64(shape):
    (x, delta, grad, beside), weight = _inputs(shape, torch.float64)
    scale = torch.full(shape[:1], torch.nan, dtype=torch.float64)
    residual, normed = rms_norm.add_rms_norm(x, delta, weight, 1e-6, columns=3, scale=scale)
    assert torch.equal(rms_norm.Factors(scale, weight)(residual), normed[:, : shape[1]])
    leaf = (x + delta).requires_grad_()
    expected = _norm(leaf, weight.double(), 1e-6)
    assert torch.equal(residual, x + delta)
    assert _error(normed[:, : shape[1]].detach(), expected.detach()) < 1e-12
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad)
    actual = rms_norm.rms_norm_backward(grad, leaf.detach(), weight, 1e-6, beside)
    assert _error(actual, expected_grad + beside) < 1e-12


@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_twin_writes_what_the_reference_writes(shape, has_delta, triton_device, half_dtype):
    twin = pytest.importorskip("halfbyte.kernels.rms_norm_triton")
    (x, delta, grad, beside), weight = _inputs(shape, half_dtype)
    args = [t.to(triton_device) for t in (x, delta, grad, beside, weight)]
    x, delta, grad, beside, weight = args
    delta = delta if has_delta else None
    expected = rms_norm.add_rms_norm.__wrapped__(x, delta, weight, 1e-6, columns=8)
    scale = torch.full(shape[:1], torch.nan, device=triton_device)
    actual = twin.add_rms_norm(x, delta, weight, 1e-6, columns=8, scale=scale)
    torch.testing.assert_close(
        rms_norm.Factors(scale, weight)(actual[0]), actual[1][:, : shape[1]], rtol=0, atol=0
    )
    assert torch.equal(actual[0], expected[0])
    assert actual[1].shape == expected[1].shape
    H = shape[1]
    assert _error(actual[1][:, :H], expected[1][:, :H].double()) < 2e-3
    wanted = rms_norm.rms_norm_backward.__wrapped__(
        grad.double(), expected[0].double(), weight, 1e-6, beside.double()
    )
    result = twin.rms_norm_backward(grad, expected[0], weight, 1e-6, beside, columns=8)
    assert result.shape == (shape[0], H + 8)
    assert _error(result[:, :H], wanted) < 4e-3


def test_no_rows_give_no_rows(triton_device):
    twin = pytest.importorskip("halfbyte.kernels.rms_norm_triton")
    x = torch.empty(0, 64, device=triton_device)
    weight = torch.ones(64, device=triton_device)
    assert twin.add_rms_norm(x, None, weight, 1e-6)[1].shape == (0, 64)
    assert twin.rms_norm_backward(x, x, weight, 1e-6, None).shape == (0, 64)
