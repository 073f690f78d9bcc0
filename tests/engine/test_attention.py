import pytest
import torch

from halfbyte.engine import attention as module
from halfbyte.engine.attention import Layout, attention, backends


def _plain(query, key, value, scale, window=99):
    """Causal softmax attention of one sequence, spelled out in float64."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeat, 1).double() for t in (key, value))
    scores = torch.einsum("snd,tnd->nst", query.double(), key) * scale
    ones = torch.ones_like(scores[0])
    scores = scores.masked_fill((ones.triu(1) + ones.tril(-window)).bool(), -torch.inf)
    return torch.einsum("nst,tnd->snd", scores.softmax(-1), value).flatten(1)


def _inputs(tokens):
    torch.manual_seed(0)
    return torch.randn(tokens, 4, 16), torch.randn(tokens, 2, 16), torch.randn(tokens, 2, 16)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 13), (3, 7)])
def test_each_row_is_a_causal_sequence_of_its_own(batch, length):
    query, key, value = _inputs(batch * length)
    with backends():
        out = attention(query, key, value, Layout(batch, length), 0.3)
    rows = [slice(i * length, (i + 1) * length) for i in range(batch)]
    expected = torch.cat([_plain(query[r], key[r], value[r], 0.3) for r in rows])
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 4, 7])
def test_a_token_sees_as_many_as_its_window_holds(window):
    query, key, value = _inputs(14)
    dense = attention(query, key, value, Layout(2, 7), 0.3, window)
    bounds = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = attention(query, key, value, Layout(1, 14, bounds, 7), 0.3, window)
    rows = (slice(7), slice(7, 14))
    expected = torch.cat([_plain(query[r], key[r], value[r], 0.3, window) for r in rows])
    torch.testing.assert_close(dense.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.double(), expected, rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    query, key, value = _inputs(12)
    bounds = torch.tensor([0, 5, 5, 6, 12], dtype=torch.int32)
    out = attention(query, key, value, Layout(1, 12, bounds, 6), 0.25)
    parts = [_plain(query[a:b], key[a:b], value[a:b], 0.25) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(out.double(), torch.cat(parts), rtol=1e-4, atol=1e-5)
    key[:5] += 1
    changed = attention(query, key, value, Layout(1, 12, bounds, 6), 0.25)
    assert torch.equal(changed[5:], out[5:])
    assert not torch.equal(changed[:5], out[:5])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "layout",
    [Layout(3, 4), Layout(1, 12, torch.tensor([0, 5, 6, 12], dtype=torch.int32), 6)],
    ids=["dense", "packed"],
)
def test_sequences_are_taken_apart_where_kernels_could_not_count_them(layout, window, monkeypatch):
    whole = [t.requires_grad_() for t in _inputs(12)]
    halved = [t.detach().clone().requires_grad_() for t in whole]
    out = attention(*whole, layout, 0.25, window)
    out.square().sum().backward()
    monkeypatch.setattr(module, "_MAX_ELEMENTS", 4 * 4 * 16)
    asked = []
    dense = module.causal_attention
    monkeypatch.setattr(
        module,
        "causal_attention",
        lambda q, *a, **k: asked.append(q.shape[:3]) or dense(q, *a, **k),
    )
    again = attention(*halved, layout, 0.25, window)
    again.square().sum().backward()
    assert all(batch == 1 for batch, _, _ in asked)
    torch.testing.assert_close(again, out)
    for actual, expected in zip(halved, whole, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [16, 100, None])
def test_windows_on_a_gpu(window):
    query, key, value = (t.repeat(1, 1, 4).cuda().bfloat16() for t in _inputs(384))
    bounds = torch.tensor([0, 192, 384], dtype=torch.int32, device="cuda")
    leaves = [t.requires_grad_() for t in (query, key, value)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    rows = (slice(192), slice(192, 384))
    expected = torch.cat([_plain(*(t[r] for t in exact), 0.1, window or 999) for r in rows])
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), exact)
    for layout in (Layout(2, 192, max_length=192), Layout(1, 384, bounds, 192)):
        with backends():
            out = attention(*leaves, layout, 0.1, window)
        torch.testing.assert_close(out.double(), expected.detach(), rtol=0.02, atol=0.02)
        grads = torch.autograd.grad((out * weight.to(out)).sum(), leaves)
        for grad, want in zip(grads, wanted, strict=True):
            assert (grad.double() - want).norm() < 0.02 * want.norm()
