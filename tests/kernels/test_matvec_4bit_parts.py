"""What stands before a decoding product is torch's arithmetic; siblings may be of any kind."""

import pytest
import torch
from torch.nn import functional as F

from halfbyte.kernels.matvec_4bit_parts import Gate, before_product, dense
from halfbyte.kernels.rms_norm import Norm
from halfbyte.quant.weight import QuantizedWeight


def test_norm_and_gates_are_those_of_torch():
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    assert before_product(x, None) is x
    weight = torch.rand(64)
    expected = F.rms_norm(x, (64,), weight, 1e-5)
    torch.testing.assert_close(before_product(x, Norm(weight, 1e-5)), expected)
    gate, up = x.chunk(2, 1)
    torch.testing.assert_close(before_product(x, Gate("silu")), F.silu(gate) * up)
    expected = F.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(before_product(x, Gate("gelu_tanh")), expected)


@pytest.mark.parametrize("double_quant", [True, False])
def test_any_kind_of_weight_becomes_dense(double_quant):
    torch.manual_seed(0)
    plain = torch.randn(4, 64)
    assert dense(plain, torch.float32) is plain
    weight = QuantizedWeight.quantize(plain, double_quant=double_quant)
    torch.testing.assert_close(dense(weight, torch.float32), weight.dequantize(torch.float32))
