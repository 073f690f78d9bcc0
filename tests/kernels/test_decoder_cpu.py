"""The compiled loops of a decoder layer against their references, which compute in float32 too."""

import pytest
import torch

from halfbyte.kernels import native
from halfbyte.kernels.gated import ACTIVATIONS, gated_backward_, gated_forward
from halfbyte.kernels.rms_norm import add_rms_norm, rms_norm_backward
from halfbyte.kernels.rope import rope_, rope_backward

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")

SIZES = [(1, 1), (3, 7), (5, 64), (130, 300)]
EPS = 1e-5


def normal(*shape, seed=0, pitch=0, dtype=torch.bfloat16):
    """Return random rows, `pitch` elements further apart than they are long."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    wide = torch.randn(*shape[:-1], shape[-1] + pitch, generator=generator).to(dtype)
    return wide[..., : shape[-1]]


def check(got, want):
    """At most one rounding of bf16 apart, and nearly always equal."""
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2.0**-7, atol=1e-6)
    assert (got == want).float().mean() > 0.97


@pytest.mark.parametrize("columns", [0, 8])
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_add_rms_norm(rows, size, has_delta, columns):
    x, weight = normal(rows, size, pitch=3), normal(size, dtype=torch.float32)
    delta = normal(rows, size, seed=1, pitch=5) if has_delta else None
    residual, normed = add_rms_norm(x, delta, weight, EPS, columns=columns)
    want_residual, want = add_rms_norm.__wrapped__(x, delta, weight, EPS)
    assert normed.shape == (rows, size + columns)
    assert torch.equal(residual, want_residual)
    check(normed[:, :size], want)


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_rms_norm_backward(rows, size, has_residual):
    grad, x = normal(rows, size, seed=1, pitch=8), normal(rows, size, pitch=3)
    weight = normal(size, dtype=torch.float32)
    around = normal(rows, size, seed=2, pitch=1) if has_residual else None
    got = rms_norm_backward(grad, x, weight, EPS, around, columns=8)
    want = rms_norm_backward.__wrapped__(grad, x, weight, EPS, around)
    assert got.shape == (rows, size + 8)
    torch.testing.assert_close(got[:, :size], want, rtol=2.0**-7, atol=2e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_gated(rows, size, activation):
    gate_up = normal(rows, 2 * size, pitch=4) * 3
    out = gated_forward(gate_up, size, activation, columns=8)
    want = gated_forward.__wrapped__(gate_up.double(), size, activation)
    check(out[:, :size], want.bfloat16())

    grad, xa = normal(rows, size, seed=1, pitch=8), normal(rows, 6, seed=2)
    gb = normal(rows, 4, seed=3, pitch=9)
    mine, theirs = gate_up.clone(), gate_up.clone()
    got = gated_backward_(mine, grad, (xa, xa), gb, size, activation)
    want = gated_backward_.__wrapped__(theirs, grad, (xa, xa), gb, size, activation)
    torch.testing.assert_close(mine, theirs, rtol=2.0**-7, atol=1e-4)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.01 * b.norm() + 1e-6


def test_gated_extremes():
    """Far from zero the activation is x or nothing; nothing becomes NaN."""
    gate_up = torch.tensor([[-3e38, -200.0, -0.0, 200.0, 1e38, 1.0, 1.0, 1.0, 1.0, 1.0]]).bfloat16()
    out = gated_forward(gate_up.expand(2, -1), 5, "silu")
    assert torch.equal(out, torch.tensor([0.0, 0.0, 0.0, 200.0, 1e38]).bfloat16().expand(2, -1))


@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("tokens", [1, 40])
def test_rope(tokens, rotated):
    heads, size, turning = 7, 16, 5
    angle = torch.rand(tokens, rotated // 2, generator=torch.Generator().manual_seed(0)) * 6
    cos, sin = (f(angle).repeat(1, 2).bfloat16() for f in (torch.cos, torch.sin))
    rows = normal(tokens, heads * size, pitch=24)
    mine, theirs = (rows.clone().view(tokens, heads, size) for _ in range(2))
    check(rope_(mine, cos, sin, turning), rope_.__wrapped__(theirs, cos, sin, turning))

    query, key, value = (normal(n, tokens, size, seed=n).transpose(0, 1) for n in (3, 2, 1))
    out, want = (torch.zeros(tokens, 6 * size + 8).bfloat16() for _ in range(2))
    check(
        rope_backward(query, key, value, cos, sin, out),
        rope_backward.__wrapped__(query, key, value, cos, sin, want),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_take_the_reference(dtype):
    x, weight = normal(4, 8, dtype=dtype), normal(8, dtype=torch.float32)
    got = add_rms_norm(x, None, weight, EPS)[1]
    assert torch.equal(got, add_rms_norm.__wrapped__(x, None, weight, EPS)[1])
    gate_up = normal(4, 16, dtype=dtype)
    assert torch.equal(
        gated_forward(gate_up, 8, "silu"), gated_forward.__wrapped__(gate_up, 8, "silu")
    )
