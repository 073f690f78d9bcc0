"""Attention of one new token a sequence over a static key-value cache, which it is written into.

Shape letters: B sequences, N query heads, M key-value heads, D head size, L room in the cache.

Positions are on the device, so one recorded graph serves every step. The rotation is that of
`kernels.rope` (the whole head turns).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated
from halfbyte.kernels.rope import rope_


@dataclass(frozen=True)
class Join:
    """How P parts of the past become one: each counts by its largest score and its sum.

    Args:
        largest: float32 `[B, N, P]`, of the scores of a part; -inf where it is empty.
        sums: float32 `[B, N, P]`, of `exp(score - largest)`.
        dtype: Of the result.
    """

    largest: Tensor
    sums: Tensor
    dtype: torch.dtype


@accelerated
def decode_attention_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> tuple[Tensor, Join | None]:
    """Put each new key and value into the cache and return what the new queries attend to.

    Args:
        qkv: `[B, (N + 2 M) * D]`, query, key and value heads before rotation, contiguous.
        cos: `[>= L, D]`, of all positions; sin: likewise.
        positions: int32 `[B]`: how many tokens each sequence has in the cache, which is also the
            position of its new one; below L.
        keys: `[B, M, L, D]`; values: likewise. Only the places of the new tokens change.
        scale: What the scores are multiplied with.

    Returns:
        `[B, N * D]` in the dtype of `qkv`, and None; or float32 sums of values weighted with
        `exp(score - largest)`, `[B, N * P * D]`, and what `join` needs to make that of them.
    """
    batch, num_kv, length, size = keys.shape
    heads = qkv.view(batch, -1, size)
    num_heads = heads.shape[1] - 2 * num_kv
    at = positions.long()
    turned = rope_(heads.clone(), cos[at], sin[at], num_heads + num_kv)
    rows = torch.arange(batch, device=qkv.device)
    keys[rows, :, at] = turned[:, num_heads : num_heads + num_kv]
    values[rows, :, at] = turned[:, num_heads + num_kv :]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    query = turned[:, :num_heads].to(wide).unflatten(1, (num_kv, -1))
    scores = torch.einsum("bmgd,bmld->bmgl", query, keys.to(wide)) * scale
    is_past = torch.arange(length, device=qkv.device) <= positions[:, None]
    weights = scores.masked_fill(~is_past[:, None, None], -torch.inf).softmax(-1)
    # What lies beyond a sequence was never written.
    past = values.to(wide).masked_fill(~is_past[:, None, :, None], 0)
    return torch.einsum("bmgl,bmld->bmgd", weights, past).reshape(batch, -1).to(qkv.dtype), None


@accelerated
def join(sums_of_values: Tensor, how: Join) -> Tensor:
    """Return attention `[B, N * D]` of its parts `[B, N * P * D]`."""
    share = torch.exp(how.largest - how.largest.amax(-1, keepdim=True))
    share /= (share * how.sums).sum(-1, keepdim=True)
    parts = sums_of_values.view(*share.shape, -1)
    return (parts * share[..., None]).sum(2).flatten(1).to(how.dtype)
