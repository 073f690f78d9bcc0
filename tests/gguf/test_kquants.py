"""Q4_K and Q6_K are read back by gguf's own decoder as what was meant."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from halfbyte.gguf.kquants import quantize_q4_k, quantize_q6_k

KINDS = [(quantize_q4_k, Type.Q4_K, 144, 0.08), (quantize_q6_k, Type.Q6_K, 210, 0.02)]
each_kind = pytest.mark.parametrize(("quantize", "kind", "size", "limit"), KINDS)


def read(quantize, kind, weight):
    return torch.from_numpy(gguf.dequantize(quantize(weight).numpy(), kind))


@each_kind
@pytest.mark.parametrize("scale", [3e-3, 0.02, 30.0])
def test_normal_weights_come_back_close(quantize, kind, size, limit, scale):
    weight = scale * torch.randn(24, 512, generator=torch.Generator().manual_seed(0))
    assert quantize(weight).shape == (24, 2 * size)
    found = read(quantize, kind, weight)
    assert (found - weight).norm() / weight.norm() < limit


def test_six_bits_beat_q8_by_less_than_their_step_and_four_beat_q4_0():
    weight = torch.randn(16, 1024, generator=torch.Generator().manual_seed(1))
    plain = gguf.dequantize(gguf.quantize(weight.numpy(), Type.Q4_0), Type.Q4_0)
    q4_k = read(quantize_q4_k, Type.Q4_K, weight)
    assert (q4_k - weight).norm() < 0.85 * np.linalg.norm(plain - weight.numpy())


@each_kind
def test_zeros_and_lone_values_survive(quantize, kind, size, limit):
    weight = torch.zeros(4, 256)
    weight[1, 7] = 3.0
    weight[2, 200] = -0.5
    weight[3] = 1e-30
    found = read(quantize, kind, weight)
    assert not found[0].any()
    assert found[1, 7] == pytest.approx(3.0, rel=0.05)
    assert found[2, 200] == pytest.approx(-0.5, rel=0.05)
    assert torch.isfinite(found).all()
    assert found[3].abs().max() < 1e-6


@each_kind
def test_blocks_do_not_touch_each_other(quantize, kind, size, limit):
    weight = torch.randn(2, 512, generator=torch.Generator().manual_seed(2))
    weight[:, :256] *= 100
    together, alone = quantize(weight), quantize(weight[:, 256:].contiguous())
    assert torch.equal(together[:, size:], alone)


def test_values_on_a_grid_are_exact():
    codes = torch.randint(0, 16, (8, 8, 32), generator=torch.Generator().manual_seed(3)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (codes * 0.5 - 4).reshape(8, 256)
    torch.testing.assert_close(read(quantize_q4_k, Type.Q4_K, weight), weight, rtol=0, atol=0.01)
