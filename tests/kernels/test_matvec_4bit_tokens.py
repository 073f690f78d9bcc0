"""Several tokens: the kernel's float16 holds x of any size; the reference does not round to it."""

import pytest
import torch

from halfbyte.kernels.matvec_4bit import matvec_4bit
from halfbyte.kernels.matvec_4bit_parts import Group
from halfbyte.kernels.matvec_4bit_tokens import several_tokens
from halfbyte.quant.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("poisoned")


def _case(device):
    torch.manual_seed(0)
    group = Group((QuantizedWeight.quantize(torch.randn(6, 128, device=device)),))
    # Beyond float16's range, beneath it, nothing at all, and one element that towers over the rest.
    x = (
        torch.randn(4, 128, device=device)
        * torch.tensor([1e20, 1e-20, 0, 1], device=device)[:, None]
    )
    x[3, 5] = 1e6
    exact = x.double() @ group.weights[0].dequantize(torch.float32).double().t()
    return x, group, exact


def test_tokens_of_any_size_are_scaled_each_by_its_own(triton_device):
    twin = pytest.importorskip("halfbyte.kernels.matvec_4bit_tokens_triton")
    x, group, exact = _case(triton_device)
    y = twin.several_tokens(x, group, None, None).double()
    assert not y[2].any()
    for row in (0, 1, 3):
        assert (y[row] - exact[row]).norm() < 2e-3 * exact[row].norm()


def test_more_tokens_than_a_tile_takes(monkeypatch, triton_device):
    twin = pytest.importorskip("halfbyte.kernels.matvec_4bit_tokens_triton")
    monkeypatch.setattr(twin, "_MAX_TOKENS_A_TILE", 8)
    torch.manual_seed(0)
    weight = QuantizedWeight.quantize(torch.randn(18, 64, device=triton_device))
    adapter = torch.randn(3, 64), torch.randn(18, 3), torch.randn(18)
    group = Group((weight,), *(t.to(triton_device) for t in adapter))
    x, residual = (torch.randn(9, n, device=triton_device) for n in (64, 18))
    expected = several_tokens(x, group, None, residual)
    ours = twin.several_tokens(x, group, None, residual)
    assert (ours - expected).norm() < 2e-3 * expected.norm()


def test_float32_stays_float32_without_a_gpu():
    x, group, exact = _case("cpu")
    for y in (several_tokens(x, group, None, None), matvec_4bit(x, group)):
        assert y.dtype == torch.float32
        for row in (0, 1, 3):
            assert (y[row] - exact[row]).norm() < 1e-6 * exact[row].norm()
