import pytest
import torch

from halfbyte.kernels import wide
from halfbyte.quant.weight import QuantizedWeight


def _weight(shape, device, dtype, **settings):
    torch.manual_seed(0)
    return QuantizedWeight.quantize((torch.randn(shape) * 0.02).to(dtype).to(device), **settings)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (33, 128), (70, 192), (5, 96), (3, 33)])
def test_weight_is_written_bit_for_bit_and_nothing_beside_it(
    shape, double_quant, triton_device, half_dtype
):
    twin = pytest.importorskip("halfbyte.kernels.wide_triton")
    weight = _weight(shape, triton_device, half_dtype, double_quant=double_quant)
    for fill in (wide.fill_weight_.__wrapped__, twin.fill_weight_):
        whole = torch.full((shape[0] + 2, shape[1] + 8), float("nan"), device=triton_device)
        whole = whole.to(half_dtype)
        fill(whole[: shape[0], : shape[1]], weight)
        assert torch.equal(whole[: shape[0], : shape[1]], weight.dequantize())
        assert whole[shape[0] :].isnan().all()
        assert whole[:, shape[1] :].isnan().all()


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_border_holds_the_adapter_and_zeros(rank, triton_device, half_dtype):
    twin = pytest.importorskip("halfbyte.kernels.wide_triton")
    torch.manual_seed(0)
    outputs, inputs, count, row, column = 70, 48, 40, 30, 48 + 8
    lora_A = torch.randn(rank, inputs, device=triton_device)
    lora_B = torch.randn(count, rank, device=triton_device)
    results = []
    for fill in (wide.fill_border_.__wrapped__, twin.fill_border_):
        whole = torch.full((outputs + 24, inputs + 24), float("nan"), device=triton_device)
        whole = whole.to(half_dtype)
        fill(
            whole, lora_A, lora_B, 0.5, rows=(row, count), column=column, inputs=inputs,
            outputs=outputs,
        )  # fmt: skip
        results.append(whole)
        beside = whole[row : row + count, inputs:]
        assert torch.equal(beside[:, 8 : 8 + rank], lora_B.to(half_dtype))
        assert (beside[:, :8] == 0).all()
        assert (beside[:, 8 + rank :] == 0).all()
        below = whole[outputs + 8 : outputs + 8 + rank, :inputs]
        assert torch.equal(below, (lora_A * 0.5).to(half_dtype))
    assert torch.equal(results[0].isnan(), results[1].isnan())
