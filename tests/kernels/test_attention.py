import pytest
import torch
from torch.nn import functional as F

from halfbyte.kernels.attention import causal_attention


def make(shape, *, kv_heads=None, dtype=torch.bfloat16, seed=0, spread=1.0):
    batch, heads, length, size = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(num_heads):
        # Tokens before heads in memory, as models have them.
        x = torch.randn(batch, length, num_heads, size, generator=generator) * spread
        return x.to(dtype).transpose(1, 2)

    kv_heads = kv_heads or heads
    tensors = [normal(heads), normal(kv_heads), normal(kv_heads)]
    return [t.detach().requires_grad_() for t in tensors], normal(heads)


def gradients(attend, tensors, grad_out):
    out = attend(*tensors)
    return out, torch.autograd.grad(out, tensors, grad_out.to(out.dtype))


def exact(tensors, grad_out, scale):
    wide = [t.detach().double().requires_grad_() for t in tensors]

    def attend(q, k, v):
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v

    return gradients(attend, wide, grad_out.double())


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1.0)).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("size", [24, 16, 80])  # the compiled loop takes multiples of 16
@pytest.mark.parametrize("length", [1, 7, 64, 65, 200])
def test_gradients_are_at_least_as_exact_as_pytorchs(length, size, kv_heads, dtype):
    scale = 0.11
    tensors, grad_out = make((2, 4, length, size), kv_heads=kv_heads, dtype=dtype)
    want_out, want = exact(tensors, grad_out, scale)
    out, got = gradients(lambda *t: causal_attention(*t, scale=scale), tensors, grad_out)
    _, theirs = gradients(
        lambda *t: F.scaled_dot_product_attention(
            *t, is_causal=True, scale=scale, enable_gqa=kv_heads is not None
        ),
        tensors,
        grad_out,
    )
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert error(out, want_out) < tolerance
    for mine, plain, expected in zip(got, theirs, want, strict=True):
        assert mine.dtype == dtype
        assert error(mine, expected) < max(1.1 * error(plain, expected), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_sharp_scores_stay_finite(dtype, tolerance):
    """Probabilities far below the largest underflow, and future tokens would overflow."""
    tensors, grad_out = make((1, 2, 130, 16), dtype=dtype, spread=12.0)
    want = exact(tensors, grad_out, 1.0)[1]
    got = gradients(lambda *t: causal_attention(*t, scale=1.0), tensors, grad_out)[1]
    for mine, expected in zip(got, want, strict=True):
        assert torch.isfinite(mine).all()
        assert error(mine, expected) < tolerance


def test_long_sequences_agree_with_short_ones():
    """Above 512 tokens the gradient is PyTorch's."""
    tensors, grad_out = make((2, 3, 513, 32))
    long = gradients(lambda *t: causal_attention(*t, scale=0.2), tensors, grad_out)[1]
    # Causal: the last token changes nothing before it, and one token less is short enough.
    short = [t[:, :, :512].detach().requires_grad_() for t in tensors]
    grad = grad_out[:, :, :512]
    want = gradients(lambda *t: causal_attention(*t, scale=0.2), short, grad)[1]
    assert error(long[0][:, :, :512], want[0].double()) < 2.0**-7


def test_the_future_is_not_seen():
    (query, key, value), _ = make((1, 2, 70, 8))
    out = causal_attention(query, key, value, scale=0.3)
    out[:, :, :40].float().sum().backward()
    for tensor in (key, value):
        assert tensor.grad[:, :, :40].any()
        assert not tensor.grad[:, :, 40:].any()


def test_gradients_lie_as_the_projections_want_them():
    tensors, grad_out = make((2, 4, 65, 8))
    got = gradients(lambda *t: causal_attention(*t, scale=0.3), tensors, grad_out)[1]
    assert all(grad.transpose(1, 2).is_contiguous() for grad in got)


def test_without_gradients_it_is_pytorchs():
    (query, key, value), _ = make((2, 4, 65, 8), kv_heads=2)
    with torch.no_grad():
        got = causal_attention(query, key, value, scale=0.3)
        want = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.3, enable_gqa=True
        )
    assert torch.equal(got, want)


def test_no_sequences():
    tensors, grad_out = make((0, 2, 5, 8))
    out, grads = gradients(lambda *t: causal_attention(*t, scale=0.3), tensors, grad_out)
    assert out.shape == (0, 2, 5, 8)
    assert all(grad.shape == (0, 2, 5, 8) for grad in grads)
