import pytest
import torch

from halfbyte.kernels.linear_4bit import grad_input_4bit, linear_4bit
from halfbyte.quant.weight import QuantizedWeight


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "shape"), [(5, (6, 10)), (0, (3, 65)), (33, (31, 7))])
def test_products_equal_those_with_the_dense_weight(rows, shape, dtype, double_quant):
    torch.manual_seed(0)
    weight = QuantizedWeight.quantize(torch.randn(shape), double_quant=double_quant)
    dense = weight.dequantize(dtype)
    x, bias, grad = torch.randn(rows, shape[1]), torch.randn(shape[0]), torch.randn(rows, shape[0])
    x, bias, grad = x.to(dtype), bias.to(dtype), grad.to(dtype)
    assert torch.equal(linear_4bit(x, weight), torch.nn.functional.linear(x, dense))
    assert torch.equal(linear_4bit(x, weight, bias), torch.nn.functional.linear(x, dense, bias))
    assert torch.equal(grad_input_4bit(grad, weight), grad @ dense)


@pytest.mark.parametrize("double_quant", [False, True])
def test_ops_declare_what_they_do(double_quant):
    weight = QuantizedWeight.quantize(torch.randn(6, 10), double_quant=double_quant)
    scales = [weight.absmax]
    if double_quant:
        scales += [weight.nested_absmax, weight.nested_map, weight.offset]
    settings = (weight.packed, scales, list(weight.shape), weight.block_size, weight.quant_type)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.halfbyte
    torch.library.opcheck(
        ops.linear_4bit.default, (torch.randn(3, 10), None, *settings), test_utils=tests
    )
    torch.library.opcheck(
        ops.grad_input_4bit.default, (torch.randn(3, 6), *settings), test_utils=tests
    )
