from dataclasses import dataclass

import pytest
import torch

from halfbyte.kernels import fp8_weight
from halfbyte.kernels.fp8 import DTYPE, balance_of, border_columns
from halfbyte.quant.weight import QuantizedWeight


@dataclass
class _Part:
    weight: object
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float = 1.0


def _implementations(name):
    twin = pytest.importorskip("halfbyte.kernels.fp8_weight_triton")
    return getattr(fp8_weight, name).__wrapped__, getattr(twin, name)


def _parts(outputs, inputs, ranks, device, **settings):
    torch.manual_seed(0)
    parts = []
    for index, (count, rank) in enumerate(zip(outputs, ranks, strict=True)):
        weight = QuantizedWeight.quantize(
            (torch.randn(count, inputs) * 0.02).to(device), **settings
        )
        adapter = (None, None)
        if rank:
            adapter = [torch.randn(s, device=device) for s in ((rank, inputs), (count, rank))]
        parts.append(_Part(weight, *adapter, scaling=0.5 + index))
    return parts


CASES = [((32,), 64, (0,)), ((150, 10), 192, (4, 4)), ((16, 48, 128), 320, (8, 0, 16))]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("outputs", "inputs", "ranks"), CASES)
def test_weights_go_from_four_bits_to_eight(outputs, inputs, ranks, transposed, triton_device):
    for settings in ({}, {"double_quant": False}, {"block_size": 256}):
        parts = _parts(outputs, inputs, ranks, triton_device, **settings)
        scales = fp8_weight.row_scales(parts)
        expected = torch.cat([p.weight.dequantize().float() for p in parts])
        expected = expected.t() if transposed else expected
        scale, columns = scales[transposed], border_columns(sum(ranks))
        assert scale.shape == expected.shape[:1]
        found = []
        for fill_ in _implementations("fill_"):
            values = torch.full((expected.shape[0], expected.shape[1] + columns), 7.0)
            values = values.to(triton_device).to(DTYPE)
            assert fill_(values, parts, scale, transposed=transposed) is values
            assert (values[:, expected.shape[1] :].float() == 7).all()
            found.append(values[:, : expected.shape[1]].float())
            back = found[-1] * scale.unsqueeze(1)
            assert ((back - expected).norm() / expected.norm()) < 0.03
            assert found[-1].abs().max() == 448
        assert (found[0] != found[1]).float().mean() < 0.002


def test_rows_of_zeros_have_a_scale_that_leaves_lora_room():
    weight = torch.randn(8, 32)
    weight[2], weight[:, 5] = 0, 0
    for scale in fp8_weight.row_scales([_Part(weight)]):
        assert scale.min() >= scale.max() * 2**-8
    for scale in fp8_weight.row_scales([_Part(torch.zeros(8, 32))]):
        assert (scale > 0).all()


@pytest.mark.parametrize("magnitude", [1.0, 1e-4, 0.0])
@pytest.mark.parametrize(("outputs", "inputs", "ranks"), CASES)
def test_factors_are_those_of_all_parts(
    outputs, inputs, ranks, magnitude, triton_device, half_dtype, monkeypatch
):
    if magnitude == 1:  # as with large ranks: few rows of B a program
        monkeypatch.setattr("halfbyte.kernels.wide_triton._RIGHT_ELEMENTS", 256)
    parts = _parts(outputs, inputs, ranks, triton_device)
    for part, rank in zip(parts, ranks, strict=True):
        if rank:
            part.lora_B *= magnitude
    scales = fp8_weight.row_scales(parts)
    N, R = sum(outputs), sum(ranks) + 3
    for factors_ in _implementations("factors_"):
        A, B = (
            torch.full(shape, torch.nan, dtype=half_dtype, device=triton_device)
            for shape in ((R, inputs), (N, R))
        )
        balances = torch.full((2,), torch.nan, device=triton_device)
        factors_(A, B, balances, parts, scales)
        expected_A, expected_B = torch.zeros_like(A), torch.zeros_like(B)
        row = rank = 0
        for part, count, own in zip(parts, outputs, ranks, strict=True):
            if own:
                expected_A[rank : rank + own] = part.lora_A
                expected_B[row : row + count, rank : rank + own] = part.lora_B * part.scaling
            row, rank = row + count, rank + own
        assert torch.equal(A, expected_A)
        assert torch.equal(B, expected_B)
        for balance, factor, scale in zip(balances, (B, A.t()), scales, strict=True):
            wanted = balance_of((factor.float() / scale[:, None]).abs().max())
            assert balance / wanted in (0.5, 1, 2)  # a GPU's square root may be next to a power


def test_dense_weights_serve_too():
    weight = torch.randn(16, 32)
    scale, _ = fp8_weight.row_scales([_Part(weight)])
    values = torch.zeros(16, 32).to(DTYPE)
    fp8_weight.fill_(values, [_Part(weight)], scale, transposed=False)
    torch.testing.assert_close(values.float() * scale[:, None], weight, rtol=0.07, atol=1e-3)
