import bitsandbytes.functional as bnb
import pytest
import torch

from halfbyte.errors import QuantizationError
from halfbyte.quant.weight import QuantizedWeight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_equals_bitsandbytes_bit_for_bit(dtype, double_quant, quant_type):
    torch.manual_seed(0)
    weight = torch.randn(96, 128).to(dtype)
    ours = QuantizedWeight.quantize(weight, quant_type=quant_type, double_quant=double_quant)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
    )
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.absmax, state.absmax)
    if double_quant:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert ours.offset.item() == state.offset.item()
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (1, 129), (33, 100)])
def test_any_shape_comes_back_close(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    quantized = QuantizedWeight.quantize(weight)
    back = quantized.dequantize()
    assert back.shape == weight.shape
    assert back.dtype == weight.dtype
    # Half of the widest gap between NF4 levels is 0.152 of a block's absmax.
    assert (back - weight).abs().max() <= 0.16 * weight.abs().max()


def test_zero_blocks_stay_exactly_zero():
    weight = torch.randn(8, 128)
    weight[2:4] = 0
    back = QuantizedWeight.quantize(weight, double_quant=False).dequantize()
    assert (back[2:4] == 0).all()
    assert (QuantizedWeight.quantize(weight, double_quant=True).dequantize()[2:4] == 0).all()


def test_dequantizes_straight_to_another_dtype():
    weight = QuantizedWeight.quantize(torch.randn(16, 64).bfloat16())
    assert torch.equal(weight.dequantize(torch.float32).bfloat16(), weight.dequantize())


def test_takes_half_a_byte_and_little_more():
    weight = QuantizedWeight.quantize(torch.randn(256, 1024))
    codes = 256 * 1024 // 2
    assert codes < weight.nbytes < 1.05 * codes


def test_moves_all_of_itself():
    moved = QuantizedWeight.quantize(torch.randn(4, 64)).to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refuses_what_is_not_finite(bad, dtype):
    weight = torch.randn(32, 64).to(dtype)
    weight[5, 7] = bad
    with pytest.raises(QuantizationError, match="NaN or Inf"):
        QuantizedWeight.quantize(weight)


def test_refuses_scales_whose_mean_may_overflow_and_no_smaller_ones():
    for everywhere in (False, True):  # the mean overflows only where all are large
        weight = torch.full((64, 64), 1e38 if everywhere else 0.01)
        weight[5, 7] = 1e38
        with pytest.raises(QuantizationError, match="overflow"):
            QuantizedWeight.quantize(weight)
        assert QuantizedWeight.quantize(weight, double_quant=False).dequantize().isfinite().all()
    QuantizedWeight.quantize(torch.full((64, 64), 5e36))


@pytest.mark.parametrize("weight", [torch.ones(2, 2, dtype=torch.int32), torch.empty(0, 64)])
def test_refuses_what_is_no_weight(weight):
    with pytest.raises(QuantizationError, match="expected"):
        QuantizedWeight.quantize(weight)
