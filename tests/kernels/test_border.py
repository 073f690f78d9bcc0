import pytest
import torch

from halfbyte.kernels import border


def test_rows_that_already_have_room_are_not_copied():
    wide = border.new_with_border(torch.empty(0), 4, 8, 3)
    x = wide[:, :8]
    result = border.with_border(x, 3)
    assert result.shape == (4, 11)
    assert result.data_ptr() == wide.data_ptr()


@pytest.mark.parametrize(
    "x",
    [torch.randn(4, 8), torch.randn(8, 4).t(), torch.randn(4, 10)[:, :8], torch.randn(43)[:40]],
)
def test_other_rows_are_copied(x):
    x = x.view(5, 8) if x.dim() == 1 else x
    result = border.with_border(x, 3)
    assert result.shape == (x.shape[0], 11)
    assert result.data_ptr() != x.data_ptr()
    assert torch.equal(result[:, :8], x)
    assert border.with_border(x, 0) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_begin_at_multiples_of_256_bytes(dtype):
    like = torch.empty(0, dtype=dtype)
    for width, columns in ((4096, 16), (14336, 48), (128, 64), (7, 1)):
        wide = border.new_with_border(like, 3, width, columns)
        assert wide.shape == (3, width + columns)
        assert wide.dtype == dtype
        assert wide.stride(0) * wide.element_size() % 256 == 0
        assert wide.stride(0) - (width + columns) < 256 // wide.element_size()
    assert border.new_with_border(like, 3, 7, 0).is_contiguous()


def test_what_lies_between_rows_is_not_multiplied():
    """On a CPU it is, by zero, where rows are of 16 bits: NaN would be NaN in the product."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is NaN then
    try:
        wide = border.new_with_border(torch.empty(0, dtype=torch.bfloat16), 66, 136, 8)
        x = border.with_border(torch.randn(66, 136, dtype=torch.bfloat16), 8)[:, :136]
    finally:
        torch.use_deterministic_algorithms(False)
    wide[:, :136] = 1
    assert (x @ wide[:, :136].t()).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5000), (0, 8)])
def test_triton_twin_copies(shape, triton_device):
    twin = pytest.importorskip("halfbyte.kernels.border_triton")
    x = torch.randn(shape, device=triton_device)
    for source in (x, torch.randn(shape[::-1], device=triton_device).t()):
        assert torch.equal(twin.copy_with_border(source, 8)[:, : shape[1]], source)
