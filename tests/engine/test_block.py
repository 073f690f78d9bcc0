import pytest
import torch
from torch.nn import functional as F

from halfbyte.engine.block import BlockShape, IntoAttention, Keep, OutOfAttention, OutWeights
from halfbyte.engine.projections import Projection, Siblings

H, INNER, D = 16, 24, 8


def _projection(outputs, inputs):
    shapes = ((outputs, inputs), (3, inputs), (outputs, 3))
    weight, lora_A, lora_B = (torch.randn(s, dtype=torch.float64) * 0.3 for s in shapes)
    return Projection(weight, None, lora_A.requires_grad_(), lora_B.requires_grad_(), 0.7)


def _plain(p, x):
    return x @ p.weight.t() + p.scaling * (x @ p.lora_A.t()) @ p.lora_B.t()


def _norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def _close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_into_attention_equals_autograd():
    torch.manual_seed(0)
    group = Siblings((_projection(2 * D, H), _projection(D, H), _projection(D, H)))
    shape = BlockShape(2, 1, D, INNER, "silu", 1e-6, 1e-6)
    x = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    weight = 1 + 0.1 * torch.randn(H, dtype=torch.float64)
    angle = torch.rand(5, D // 2, dtype=torch.float64).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    outputs = IntoAttention.apply(x, group, shape, weight, cos, sin, None, *group.adapters)

    def turn(t):
        half = torch.cat((-t[..., D // 2 :], t[..., : D // 2]), -1)
        return t * cos[:, None] + half * sin[:, None]

    normed = _norm(x, weight)
    query, key, value = (_plain(p, normed).view(5, -1, D) for p in group.projections)
    expected = (x, turn(query), turn(key), value)
    _close(outputs, expected)
    grads = [torch.randn_like(t) for t in expected]
    inputs = [x, *group.adapters]
    _close(
        torch.autograd.grad(outputs, inputs, grads), torch.autograd.grad(expected, inputs, grads)
    )


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_out_of_attention_equals_autograd(activation, everything):
    torch.manual_seed(0)
    weights = OutWeights(
        Siblings((_projection(H, 2 * D),)),
        Siblings((_projection(INNER, H), _projection(INNER, H))),
        Siblings((_projection(H, INNER),)),
    )
    shape = BlockShape(2, 1, D, INNER, activation, 1e-6, 1e-6)
    attention = torch.randn(5, 2 * D, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    norm = 1 + 0.1 * torch.randn(H, dtype=torch.float64)
    keep = Keep(everything=everything)
    y = OutOfAttention.apply(attention, x, weights, shape, norm, keep, None, *weights.adapters)
    mid = x + _plain(weights.o.projections[0], attention)
    gate, up = (_plain(p, _norm(mid, norm)) for p in weights.gate_up.projections)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    expected = mid + _plain(weights.down.projections[0], act * up)
    _close([y], [expected])
    grad = torch.randn_like(y)
    inputs = [attention, x, *weights.adapters]
    _close(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad))
