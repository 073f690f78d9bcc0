import dataclasses

import pytest
import torch

from halfbyte.engine.projections import Projection, Siblings, pairs
from halfbyte.kernels.dropout import dropout
from halfbyte.quant.weight import QuantizedWeight


def _siblings(*, ranks=(4, 0, 3), scalings=(0.5, 1.0, 2.0), bias=False, quantized=False):
    torch.manual_seed(0)
    projections = []
    for outputs, rank, scaling in zip((6, 4, 5), ranks, scalings, strict=True):
        weight = torch.randn(outputs, 64, dtype=torch.float64)
        if quantized:
            weight = QuantizedWeight.quantize(weight.float())
        adapter = [
            torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
            for shape in ((rank, 64), (outputs, rank))
        ] if rank else [None, None]  # fmt: skip
        own_bias = torch.randn(outputs, dtype=torch.float64) if bias else None
        projections.append(Projection(weight, own_bias, *adapter, scaling))
    return Siblings(tuple(projections))


CASES = [
    {},
    {"bias": True},
    {"ranks": (0, 0, 0)},
    {"ranks": (8, 8, 8), "scalings": (2.0, 2.0, 2.0)},
    {"quantized": True},
]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients_equal_autograd(plain_outputs, case, p):
    group = dataclasses.replace(_siblings(**case), dropout=p, salt=3)
    seed = torch.tensor([1, 2])
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    mask = group.mask(seed)
    expected = plain_outputs(group, x, x if mask is None else dropout(x, mask))
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [x, *group.adapters], grad)
    with torch.no_grad():
        x_wide = torch.full((7, 64 + group.rank), torch.nan, dtype=torch.float64)
        x_wide[:, :64] = x
        wide = group.wide(x_wide)
        xa = group.down_(x_wide, wide, seed)
        actual = group.forward(x_wide, wide, x.new_empty(7, group.outputs))
        grad_wide = torch.full((7, group.outputs + group.rank), torch.nan, dtype=torch.float64)
        grad_wide[:, : group.outputs] = grad
        group.up_(grad_wide, wide)
        grads = [group.backward_input(grad_wide, wide, seed)]
        grads_A = group.grad_A_(grad_wide, wide, x, seed, grads[0])
        grads += pairs(grads_A, group.grad_B(grad_wide, xa))
    torch.testing.assert_close(actual, expected.detach())
    assert len(grads) == len(expected_grads)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_ranks_are_padded_to_eight_and_counted():
    group = _siblings()
    assert (group.inputs, group.outputs, group.rank) == (64, 15, 8)
    assert group.columns == (6, 10, 15)
    assert group.scaling is None
    assert len(group.adapters) == 4
