import pytest
import torch

from halfbyte.kernels import skinny
from halfbyte.kernels.dropout import Mask, dropout, kept
from halfbyte.kernels.rms_norm import Factors

SHAPES = [(1, 48, 8), (7, 520, 48), (70, 72, 136)]


@pytest.fixture(params=["reference", "triton"])
def kernels(request):
    """The reference's functions, and the twin's."""
    if request.param == "triton":
        return pytest.importorskip("halfbyte.kernels.skinny_triton")
    names = ("rank_product_", "rank_gradient")
    functions = {name: staticmethod(getattr(skinny, name).__wrapped__) for name in names}
    return type("Reference", (), functions)


def _random(rows, columns, pitch, device, dtype):
    """Return a matrix in rows with room behind them, and NaN there."""
    whole = torch.full((rows, columns + pitch), torch.nan, device=device, dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns)
    return whole[:, :columns]


def _mask(drops, device):
    return Mask(0.3, torch.tensor([11, 5], device=device), 2) if drops else None


def _error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(shape, drops, kernels, triton_device, half_dtype):
    rows, width, rank = shape
    torch.manual_seed(0)
    x = _random(rows, width, 8, triton_device, half_dtype)
    lora_A = _random(rank, width, 3, triton_device, half_dtype)
    lora_B = _random(width, rank, 8, triton_device, half_dtype)
    mask = _mask(drops, triton_device)
    read = x.double() if mask is None else dropout(x.double(), mask)
    for factor in (lora_A.t(), lora_B):
        out = torch.full((rows, rank + 8), torch.nan, device=triton_device, dtype=half_dtype)
        scaled = kernels.rank_product_(out[:, :rank], x, factor, mask=mask, scaling=0.5)
        assert _error(out[:, :rank], read @ factor.double()) < 4e-3
        assert torch.equal(scaled, out[:, :rank] * 0.5)
        assert scaled.is_contiguous()
        assert kernels.rank_product_(out[:, :rank], x, factor, mask=mask).shape == scaled.shape
        assert out[:, rank:].isnan().all()


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, drops, kernels, triton_device, half_dtype):
    rows, width, rank = shape
    torch.manual_seed(0)
    gb = _random(rows, rank, 8, triton_device, half_dtype)
    x = _random(rows, width, 3, triton_device, half_dtype)
    lora_A = _random(rank, width, 8, triton_device, half_dtype)
    grad_x = _random(rows, width, 8, triton_device, half_dtype)
    mask, before = _mask(drops, triton_device), grad_x.double()
    read = x.double() if mask is None else dropout(x.double(), mask)
    for target in (None, grad_x):
        grad = kernels.rank_gradient(gb, x, mask, lora_A, target)
        assert grad.dtype == torch.float32
        assert _error(grad, gb.double().t() @ read) < 4e-3
    expected = before
    if mask is not None:
        expected = before + dropout(gb.double() @ lora_A.double(), mask)
    assert _error(grad_x, expected) < 4e-3


@pytest.mark.parametrize("drops", [True, False])
def test_gradient_against_what_was_normed(drops, kernels, triton_device, half_dtype):
    torch.manual_seed(0)
    x, gb = (_random(37, n, 8, triton_device, half_dtype) for n in (48, 8))
    norm = Factors(torch.rand(37, device=triton_device), torch.randn(48, device=triton_device))
    mask = _mask(drops, triton_device)
    expected = kernels.rank_gradient(gb, norm(x), mask)
    actual = kernels.rank_gradient(gb, x, mask, norm=norm)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["product", "gradient"])
def test_kernels_serve_without_dropout_too(name, triton_device, half_dtype, monkeypatch):
    twin = pytest.importorskip("halfbyte.kernels.skinny_triton")
    monkeypatch.setitem(twin._WITHOUT_DROPOUT, name, True)
    test_product(SHAPES[1], False, twin, triton_device, half_dtype)
    test_gradient(SHAPES[1], False, twin, triton_device, half_dtype)


@pytest.mark.parametrize("first", [(0, 0, 0, 0.5), (2**62 - 1, 8191, 127, 0.05), (1, 5, 1, 0.9)])
def test_both_drop_the_same_bits_as_the_reference(first, kernels, triton_device):
    seed, row, salt, p = first
    mask = Mask(p, torch.tensor([seed, row], device=triton_device), salt)
    x, eye = torch.ones(37, 41, device=triton_device), torch.eye(41, device=triton_device)
    read = torch.empty_like(x)
    kernels.rank_product_(read, x, eye, mask=mask)
    assert torch.equal(read != 0, kept(mask, 37, 41))
    grad_x, gb = torch.zeros_like(x), torch.ones(37, 1, device=triton_device)
    sums = kernels.rank_gradient(gb, x, mask, torch.ones(1, 41, device=triton_device), grad_x)
    assert torch.equal(grad_x, read)
    torch.testing.assert_close(sums[0], read.sum(0))


def test_nothing_gives_nothing(kernels, triton_device):
    for rows, rank in ((0, 8), (3, 0)):
        x, gb = torch.randn(rows, 16), torch.randn(rows, rank)
        x, gb, factor = (t.to(triton_device) for t in (x, gb, torch.randn(16, rank)))
        mask = _mask(True, triton_device)
        assert kernels.rank_product_(gb, x, factor, mask=mask).shape == (rows, rank)
        grad = kernels.rank_gradient(gb, x, mask, factor.t(), torch.zeros_like(x))
        assert torch.equal(grad, torch.zeros(rank, 16, device=triton_device))
