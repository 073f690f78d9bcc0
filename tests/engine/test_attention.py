import pytest
import torch

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
