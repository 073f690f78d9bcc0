import pytest
import torch

from halfbyte.kernels import dropout
from halfbyte.kernels.dropout import Mask


@pytest.fixture(params=["reference", "triton"])
def kernels(request):
    """The reference's functions, and the twin's."""
    if request.param == "triton":
        return pytest.importorskip("halfbyte.kernels.dropout_triton")
    return type(
        "Reference",
        (),
        {
            "dropout": staticmethod(dropout.dropout.__wrapped__),
            "add_masked_product_": staticmethod(dropout.add_masked_product_.__wrapped__),
        },
    )


def test_share_scale_and_seed(kernels, triton_device):
    x = torch.ones(64, 300, device=triton_device)
    seed = torch.tensor([7, 0], device=triton_device)
    dropped = kernels.dropout(x, Mask(0.25, seed, 3))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropped, kernels.dropout(x, Mask(0.25, seed, 3)))
    assert not torch.equal(dropped, kernels.dropout(x, Mask(0.25, seed, 4)))
    other = torch.tensor([8, 0], device=triton_device)
    assert not torch.equal(dropped, kernels.dropout(x, Mask(0.25, other, 3)))
    rows_differ = (dropped[0] != dropped[1]).float().mean().item()
    assert 0.2 < rows_differ < 0.55


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 63, 4), (70, 130, 24)])
def test_the_gradient_uses_the_mask_of_the_forward(shape, kernels, triton_device, half_dtype):
    rows, width, rank = shape
    torch.manual_seed(0)
    seed = torch.tensor([11, 0], device=triton_device)
    gb = torch.randn(rows, rank + 3, device=triton_device).to(half_dtype)[:, :rank]
    lora_A = torch.randn(rank, width, device=triton_device).to(half_dtype)
    grad = torch.randn(rows, width, device=triton_device).to(half_dtype)
    mask = kernels.dropout(torch.ones_like(grad), Mask(0.4, seed, 2)).double() != 0
    expected = grad.double() + mask * (gb.double() @ lora_A.double()) / 0.6
    actual = kernels.add_masked_product_(grad, gb, lora_A, Mask(0.4, seed, 2))
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)


def test_a_pitch_is_fine(kernels, triton_device):
    wide = torch.randn(5, 40, device=triton_device)
    seed = torch.tensor([1, 0], device=triton_device)
    whole = kernels.dropout(wide[:, :32].contiguous(), Mask(0.5, seed, 0))
    assert torch.equal(kernels.dropout(wide[:, :32], Mask(0.5, seed, 0)), whole)


def test_rows_of_a_cut_batch_drop_what_they_would_whole(kernels, triton_device):
    x = torch.ones(10, 40, device=triton_device)
    seed = torch.tensor([5, 0], device=triton_device)
    whole = kernels.dropout(x, Mask(0.5, seed, 1))
    for first in (0, 3, 7):
        part = kernels.dropout(x[first:], Mask(0.5, seed + torch.tensor([0, first]).to(seed), 1))
        assert torch.equal(part, whole[first:])
