"""Attention of one new token equals the last row of causal attention over all tokens."""

import pytest
import torch
from torch.nn import functional as F

from halfbyte.kernels.decode_attention import Join, decode_attention_, join
from halfbyte.kernels.rope import rope_

pytestmark = pytest.mark.usefixtures("poisoned")


def _implementations():
    twin = pytest.importorskip("halfbyte.kernels.decode_attention_triton")
    return decode_attention_.__wrapped__, twin.decode_attention_, twin.join


@pytest.mark.parametrize(("N", "M", "D"), [(4, 2, 16), (3, 1, 32), (1, 1, 256)])
def test_it_is_the_last_row_of_causal_attention(N, M, D, triton_device, half_dtype):
    torch.manual_seed(0)
    lengths, L = [1, 65, 130], 130
    B = len(lengths)
    angles = torch.rand(L, D // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(triton_device), angles.sin().to(triton_device)
    raw = torch.randn(B, L, N + 2 * M, D).to(half_dtype).to(triton_device)
    turned = torch.stack([rope_.__wrapped__(row.clone(), cos, sin, N + M) for row in raw])
    query, key, value = turned.float().transpose(1, 2).split([N, M, M], 1)
    expected = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.2, enable_gqa=True
    ).transpose(1, 2)
    positions = torch.tensor(lengths, dtype=torch.int32, device=triton_device) - 1
    qkv = torch.stack([raw[b, n - 1] for b, n in enumerate(lengths)]).flatten(1)
    *implementations, join_of_twin = _implementations()
    for attend in implementations:
        # What was never written is NaN: nothing may come of it.
        keys = torch.full((B, M, L, D), torch.nan, dtype=half_dtype, device=triton_device)
        values = keys.clone()
        for b, n in enumerate(lengths):
            keys[b, :, : n - 1] = key[b, :, : n - 1].to(half_dtype)
            values[b, :, : n - 1] = value[b, :, : n - 1].to(half_dtype)
        out, parts = attend(qkv, cos, sin, positions, keys, values, 0.2)
        if parts is not None:
            out = join_of_twin(out, parts)
        out = out.view(B, N, D)
        for b, n in enumerate(lengths):
            torch.testing.assert_close(out[b].float(), expected[b, n - 1], rtol=1e-2, atol=4e-3)
            torch.testing.assert_close(keys[b, :, :n].float(), key[b, :, :n], rtol=1e-3, atol=1e-4)
            assert torch.equal(values[b, :, :n].float(), value[b, :, :n])
            assert keys[b, :, n:].isnan().all()


def test_parts_count_by_their_largest_score_and_sum():
    torch.manual_seed(0)
    scores, values = torch.randn(2, 3, 20) * 30, torch.randn(2, 3, 20, 16)
    expected = (scores.softmax(-1).unsqueeze(-1) * values).sum(2).flatten(1)
    # Parts of 5, and one that is empty.
    cut = scores.unflatten(2, (4, 5))
    largest = cut.amax(-1)
    weights = torch.exp(cut - largest[..., None])
    sums, mixed = weights.sum(-1), (weights[..., None] * values.unflatten(2, (4, 5))).sum(3)
    empty = torch.zeros(2, 3, 1)
    how = Join(
        torch.cat([largest, empty - torch.inf], 2), torch.cat([sums, empty], 2), torch.float32
    )
    mixed = torch.cat([mixed, torch.zeros(2, 3, 1, 16)], 2)
    torch.testing.assert_close(join(mixed.flatten(1), how), expected)
