"""Causal attention whose gradient on a CPU is made a head at a time, in cache.

Forward is PyTorch's own, everywhere, and so is the gradient on a GPU and of long sequences. Of
short ones PyTorch's gradient takes several times what its products would on a CPU. Here the
probabilities are made again from the saved log-sum-exp (FlashAttention, Dao et al. 2022, arXiv
2205.14135, section 3), in float32, which is also twice as exact:

    P = exp(s Q K^T - lse)     dV = P^T dO      dS = P * (dO V^T - rowsum(dO * O))
    dQ = s dS K                dK = s dS^T Q

Shape letters: B sequences, N query heads, M key-value heads, S tokens, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.kernels.dispatch import accelerated

# Float32 scores held at once: they stay in the second-level cache of two cores.
_SCORE_BYTES = 1 << 20
_BLOCK_ROWS = 64
# Measured: PyTorch's gradient takes 4 times as long at 128 tokens, 1.3 times at 512, less at 2048.
_MAX_TOKENS = 512
# exp of less than this is subnormal, which CPUs are slow at; it is nothing beside the largest, 1.
_SMALLEST_EXPONENT = -80.0


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """Return `softmax(scale * Q K^T, causal) V` as `[B, N, S, D]`.

    Args:
        query: `[B, N, S, D]`, any strides.
        key: `[B, M, S, D]`, N a multiple of M.
        value: `[B, M, S, D]`.
        scale: What the scores are multiplied with.
        window: How many tokens a token sees, itself one of them; None: all before it.
    """
    if window is not None and window < query.shape[2]:
        return _within_window(query, key, value, scale, window)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    is_ours = query.device.type == "cpu" and 0 < query.shape[2] <= _MAX_TOKENS
    if not (is_ours and needs_grad and query.numel()):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return _CausalAttention.apply(query, key, value, scale)


def _within_window(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
    mask = seen.tril_().triu_(1 - window)
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=is_grouped
    )


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=True, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, log_sum_exp = ctx.saved_tensors
        grads = causal_attention_backward(
            query, key, value, out, log_sum_exp, grad_out, scale=ctx.scale
        )
        return *grads, None


@accelerated
def causal_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key and value, `[B, N, S, D]`, tokens before heads in memory.

    Args:
        query, key, value: `[B, N, S, D]`, any strides.
        out: `[B, N, S, D]`, what the forward returned.
        log_sum_exp: float32 `[B, N, S]`, of the forward's scores.
        grad_out: `[B, N, S, D]`.
        scale: As in the forward.
    """
    batch, heads, length, _ = query.shape
    grads = [torch.empty_like(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value)]
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = min(_BLOCK_ROWS, length)
    step = max(1, _SCORE_BYTES // (4 * rows * length))
    for b in range(batch):
        for start in range(0, heads, step):
            some = slice(start, start + step)
            q, k, v, o, g = (t[b, some].to(wide) for t in (query, key, value, out, grad_out))
            minus_lse = log_sum_exp[b, some].to(wide).neg().unsqueeze(-1)
            parts = _heads_backward(q * scale, k, v, o, g, minus_lse)
            parts[0].mul_(scale)
            for grad, part in zip(grads, parts, strict=True):
                grad[b, some] = part
    return tuple(grads)


def _heads_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, grad_out: Tensor, minus_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the (scaled) query, the key and the value of some heads.

    Args:
        query, key, value, out, grad_out: float32 `[n, S, D]`.
        minus_lse: float32 `[n, S, 1]`.
    """
    length = query.shape[1]
    minus_delta = (out * grad_out).sum(-1, keepdim=True).neg_()
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    for start in range(0, length, _BLOCK_ROWS):
        rows, past = slice(start, start + _BLOCK_ROWS), slice(0, start + _BLOCK_ROWS)
        scores = torch.baddbmm(minus_lse[:, rows], query[:, rows], key[:, past].transpose(1, 2))
        probabilities = scores.clamp_(min=_SMALLEST_EXPONENT).exp_().tril_(start)
        grad_scores = torch.baddbmm(
            minus_delta[:, rows], grad_out[:, rows], value[:, past].transpose(1, 2)
        ).mul_(probabilities)
        grad_value[:, past].baddbmm_(probabilities.transpose(1, 2), grad_out[:, rows])
        grad_key[:, past].baddbmm_(grad_scores.transpose(1, 2), query[:, rows])
        torch.bmm(grad_scores, key[:, past], out=grad_query[:, rows])
    return grad_query, grad_key, grad_value
