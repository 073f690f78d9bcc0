import pytest
import torch
from torch.nn import functional as F

from halfbyte.engine.block import (
    BlockShape,
    IntoAttention,
    IntoWeights,
    Keep,
    OutOfAttention,
    OutWeights,
)
from halfbyte.engine.projections import Projection, Siblings
from halfbyte.kernels.dropout import dropout
from halfbyte.kernels.rms_norm import Norm

H, INNER, D = 16, 24, 8
SEEDS = [None, torch.tensor([3, 1])]


def _projection(outputs, inputs):
    shapes = ((outputs, inputs), (3, inputs), (outputs, 3))
    weight, lora_A, lora_B = (torch.randn(s, dtype=torch.float64) * 0.3 for s in shapes)
    return Projection(weight, None, lora_A.requires_grad_(), lora_B.requires_grad_(), 0.7)


def _plain(p, x, mask=None):
    read = x if mask is None else dropout(x, mask)
    return x @ p.weight.t() + p.scaling * (read @ p.lora_A.t()) @ p.lora_B.t()


def _siblings(*projections, salt=0):
    return Siblings(projections, dropout=0.4, salt=salt)


def _plain_norm(x, norm):
    if norm is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def _norm(*shape):
    return Norm(1 + 0.1 * torch.randn(shape, dtype=torch.float64), 1e-6)


def _close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", SEEDS, ids=["whole", "dropped"])
@pytest.mark.parametrize("has_head_norms", [False, True])
def test_into_attention_equals_autograd(has_head_norms, seed):
    torch.manual_seed(0)
    group = _siblings(_projection(2 * D, H), _projection(D, H), _projection(D, H))
    weights = IntoWeights(group, _norm(H), _norm(3, D) if has_head_norms else None)
    shape = BlockShape(2, 1, D, INNER, "silu")
    x = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    angle = torch.rand(5, D // 2, dtype=torch.float64).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    outputs = IntoAttention.apply(x, weights, shape, cos, sin, seed, *group.adapters)

    def turn(t):
        half = torch.cat((-t[..., D // 2 :], t[..., : D // 2]), -1)
        return t * cos[:, None] + half * sin[:, None]

    normed = _plain_norm(x, weights.norm)
    query, key, value = (
        _plain(p, normed, group.mask(seed)).view(5, -1, D) for p in group.projections
    )
    rotated = turn(_plain_norm(torch.cat((query, key), 1), weights.head_norm))
    expected = (x, rotated[:, :2], rotated[:, 2:], value)
    _close(outputs, expected)
    grads = [torch.randn_like(t) for t in expected]
    inputs = [x, *group.adapters]
    _close(
        torch.autograd.grad(outputs, inputs, grads), torch.autograd.grad(expected, inputs, grads)
    )


@pytest.mark.parametrize("seed", SEEDS, ids=["whole", "dropped"])
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("is_one", [False, True])
def test_out_of_attention_equals_autograd(is_one, activation, everything, seed):
    """With gate and up as two projections, or as one and with norms of both branches."""
    torch.manual_seed(0)
    both = (2 * INNER,) if is_one else (INNER, INNER)
    weights = OutWeights(
        _siblings(_projection(H, 2 * D)),
        _siblings(*(_projection(outputs, H) for outputs in both), salt=1),
        _siblings(_projection(H, INNER), salt=2),
        _norm(H),
        *((_norm(H), _norm(H)) if is_one else ()),
    )
    shape = BlockShape(2, 1, D, INNER, activation)
    attention = torch.randn(5, 2 * D, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    keep = Keep(everything=everything)
    y = OutOfAttention.apply(attention, x, weights, shape, keep, seed, *weights.adapters)
    masks = [group.mask(seed) for group in (weights.o, weights.gate_up, weights.down)]
    mid = x + _plain_norm(_plain(weights.o.projections[0], attention, masks[0]), weights.after_o)
    normed = _plain_norm(mid, weights.norm)
    both = [_plain(p, normed, masks[1]) for p in weights.gate_up.projections]
    gate, up = torch.cat(both, 1).chunk(2, 1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    down = _plain(weights.down.projections[0], act * up, masks[2])
    expected = mid + _plain_norm(down, weights.after_down)
    _close([y], [expected])
    grad = torch.randn_like(y)
    inputs = [attention, x, *weights.adapters]
    _close(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad))
