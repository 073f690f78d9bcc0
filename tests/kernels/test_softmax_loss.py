import pytest
import torch

from halfbyte.kernels.softmax_loss import softmax_loss_


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5}, {"softcap": 3.0}, {"bias": True}])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5000), (0, 7)])
def test_triton_twin_equals_float64(shape, options, triton_device, half_dtype):
    twin = pytest.importorskip("halfbyte.kernels.softmax_loss_triton")
    torch.manual_seed(0)
    rows, vocabulary = shape
    logits = (4 * torch.randn(shape)).to(half_dtype).to(triton_device)
    target = torch.randint(0, vocabulary, (rows,), device=triton_device)
    options = dict(options)
    if "bias" in options:
        options["bias"] = torch.randn(vocabulary, device=triton_device)
    exact = logits.double()
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = softmax_loss_.__wrapped__(exact, target, **wide)
    actual = twin.softmax_loss_(logits, target, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact, rtol=8e-3, atol=1e-3)


def test_reference_equals_autograd():
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 8, 3, 3])
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    buffer = logits.detach().clone()
    torch.testing.assert_close(softmax_loss_(buffer, target), loss.detach().float())
    torch.testing.assert_close(buffer, grad)
