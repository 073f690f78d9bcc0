from dataclasses import dataclass

import pytest
import torch

from halfbyte.kernels import wide
from halfbyte.quant.weight import QuantizedWeight


@dataclass
class _Part:
    weight: object
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float = 1.0


def _parts(outputs, inputs, ranks, device, dtype, **settings):
    torch.manual_seed(0)
    parts = []
    for index, (count, rank) in enumerate(zip(outputs, ranks, strict=True)):
        dense = (torch.randn(count, inputs) * 0.02).to(dtype).to(device)
        weight = QuantizedWeight.quantize(dense, **settings)
        adapter = (None, None)
        if rank:
            adapter = (
                torch.randn(rank, inputs, device=device),
                torch.randn(count, rank, device=device),
            )
        parts.append(_Part(weight, *adapter, scaling=0.5 + index))
    return parts


CASES = [
    ((1,), 64, (0,)),
    ((33, 70), 128, (4, 4)),
    ((70, 10, 129), 192, (4, 0, 16)),
    ((5, 3), 96, (1, 2)),
    ((40, 9, 3), 1088, (3, 0, 2)),
]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("outputs", "inputs", "ranks"), CASES)
def test_every_part_is_where_it_belongs(
    outputs, inputs, ranks, double_quant, triton_device, half_dtype
):
    twin = pytest.importorskip("halfbyte.kernels.wide_triton")
    parts = _parts(outputs, inputs, ranks, triton_device, half_dtype, double_quant=double_quant)
    N, R = sum(outputs), sum(ranks) + 3
    for assemble in (wide.assemble_.__wrapped__, twin.assemble_):
        matrix = torch.full((N + R, inputs + R), float("nan"), device=triton_device)
        matrix = matrix.to(half_dtype)
        assemble(matrix, parts)
        expected = torch.zeros_like(matrix)
        row = rank = 0
        for part, count, own in zip(parts, outputs, ranks, strict=True):
            expected[row : row + count, :inputs] = part.weight.dequantize()
            if own:
                columns = slice(inputs + rank, inputs + rank + own)
                expected[row : row + count, columns] = part.lora_B * part.scaling
                expected[N + rank : N + rank + own, :inputs] = part.lora_A
            row, rank = row + count, rank + own
        assert torch.equal(matrix[:N], expected[:N])
        assert torch.equal(matrix[:, :inputs], expected[:, :inputs])
        assert matrix[N:, inputs:].isnan().all()


def test_large_ranks_are_written_in_fewer_rows_a_program(triton_device, half_dtype, monkeypatch):
    twin = pytest.importorskip("halfbyte.kernels.wide_triton")
    assert [twin.right_rows(width) for width in (16, 64, 256, 1024, 8192)] == [64, 64, 16, 4, 1]
    monkeypatch.setattr(twin, "_RIGHT_ELEMENTS", 64)
    parts = _parts((33, 10), 64, (4, 3), triton_device, half_dtype)
    matrix = torch.full((43 + 8, 64 + 8), float("nan"), device=triton_device, dtype=half_dtype)
    expected = wide.assemble_.__wrapped__(matrix.clone(), parts)
    assert torch.equal(twin.assemble_(matrix, parts)[:43], expected[:43])
    assert torch.equal(matrix[43:, :64], expected[43:, :64])


@pytest.mark.parametrize(("block_size", "inputs"), [(32, 96), (512, 1536), (4096, 4096)])
def test_blocks_of_other_sizes(block_size, inputs, triton_device, half_dtype):
    twin = pytest.importorskip("halfbyte.kernels.wide_triton")
    settings = {"block_size": block_size, "quant_type": "nf4" if block_size > 32 else "fp4"}
    parts = _parts((1, 2), inputs, (0, 0), triton_device, half_dtype, **settings)
    matrix = torch.full((3, inputs), float("nan"), device=triton_device, dtype=half_dtype)
    twin.assemble_(matrix, parts)
    assert torch.equal(matrix, torch.cat([part.weight.dequantize() for part in parts]))


def test_dense_weights_are_taken_as_they_are():
    dense = torch.randn(6, 5)
    part = _Part(dense, torch.randn(2, 5), torch.randn(6, 2), 2.0)
    matrix = wide.assemble_(torch.empty(8, 7), [part])
    assert torch.equal(matrix[:6, :5], dense)
    assert torch.equal(matrix[:6, 5:], part.lora_B * 2)
    assert torch.equal(matrix[6:, :5], part.lora_A)


@pytest.mark.parametrize(("outputs", "inputs", "ranks"), CASES)
def test_the_border_can_be_written_alone(outputs, inputs, ranks, triton_device):
    twin = pytest.importorskip("halfbyte.kernels.wide_triton")
    parts = _parts(outputs, inputs, ranks, triton_device, torch.float32)
    N, R = sum(outputs), sum(ranks)
    for assemble in (wide.assemble_, wide.assemble_.__wrapped__, twin.assemble_):
        matrix = torch.zeros(N + R, inputs + R, device=triton_device)
        expected = assemble(matrix.clone(), parts)
        expected[:N, :inputs] = 7
        matrix[:N, :inputs] = 7
        assert torch.equal(assemble(matrix, parts, only_border=True), expected)
