"""Cross-entropy of a linear head, without the logits of the whole batch.

The rows that carry a label are taken in chunks. A chunk's logits are made, turned into its loss
and, in place, into their own gradient, `softmax(z) - onehot(label)`, which times the head at once
becomes the gradient of the chunk's hidden states. So the backward pass has nothing left to do but
to scale, and memory holds one chunk of logits, however long the batch. The idea is that of Liger's
fused linear cross-entropy (arXiv 2410.10989).
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from halfbyte.errors import DataError

IGNORE_INDEX = -100

# Float32 logits held at once.
_CHUNK_BYTES = 32 * 2**20
# On a GPU the head is read once a chunk: with fewer rows memory would bound the matrix products.
_MIN_CHUNK_ROWS_CUDA = 512


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return the sum over rows of -log softmax(z)[label], z = softcap(logit_scale * (h W^T + b)).

    Args:
        hidden: [N, h], float32, bfloat16 or float16.
        weight: The head, [V, h], in hidden's dtype. While it needs no gradient, that of hidden is
            computed in the forward pass; else chunks are recomputed in the backward pass.
        labels: int64 [N], already shifted; rows of -100 are skipped.
        bias: [V] or None.
        chunk_rows: Rows of logits at a time; None takes a few tens of MB.
        logit_scale: Factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Gemma 2's cap c: z becomes c * tanh(z / c).

    Returns:
        float32 scalar; 0, with gradients of zeros, where no row has a label.

    Raises:
        DataError: A label is neither -100 nor in [0, V); checked on the CPU, CUDA asserts itself.
    """
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if rows.numel() < labels.numel():
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    if labels.numel() == 0:
        return hidden.float().sum() + weight[:0].float().sum()
    _check_labels(labels, weight.shape[0])
    rows_at_once = chunk_rows or _default_chunk_rows(weight)
    head = _Head(logit_scale, softcap)
    needs_grad = torch.is_grad_enabled()
    if needs_grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _recomputed(hidden, weight, labels, bias, head, rows_at_once)
    if needs_grad and hidden.requires_grad:
        return _LinearCrossEntropy.apply(hidden, weight, labels, bias, head, rows_at_once)
    return _forward(hidden, weight, labels, bias, head, rows_at_once, None)


class _Head:
    """What happens to the logits after the matrix product."""

    def __init__(self, logit_scale: float, softcap: float | None) -> None:
        self.logit_scale = logit_scale
        self.softcap = softcap

    def logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the float32 logits [n, V] of hidden [n, h]."""
        z = torch.nn.functional.linear(hidden, weight, bias).float()
        if self.logit_scale != 1.0:
            z = z * self.logit_scale
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        return z

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Return the derivative of the logits by the matrix product's result."""
        if self.softcap is None:
            return self.logit_scale
        return (1.0 - (logits / self.softcap).square_()).mul_(self.logit_scale)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    head: _Head,
    chunk_rows: int,
    grad_hidden: torch.Tensor | None,
) -> torch.Tensor:
    """Return the loss; write its gradient to `grad_hidden` where there is one."""
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_rows):
        chunk = slice(start, start + chunk_rows)
        target = labels[chunk, None]
        logits = head.logits(hidden[chunk], weight, bias)
        target_logits = logits.gather(1, target)
        slope = 1.0 if grad_hidden is None else head.slope(logits)
        log_sum = torch.logsumexp(logits, dim=1, keepdim=True)
        loss += (log_sum - target_logits).sum()
        if grad_hidden is not None:
            probabilities = logits.sub_(log_sum).exp_()
            probabilities.scatter_add_(1, target, torch.full_like(target_logits, -1.0))
            if not isinstance(slope, float) or slope != 1.0:
                probabilities.mul_(slope)
            torch.mm(probabilities.to(weight.dtype), weight, out=grad_hidden[chunk])
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The head is frozen: the gradient of the hidden states is ready when the loss is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        head: _Head,
        chunk_rows: int,
    ) -> torch.Tensor:
        grad_hidden = torch.empty_like(hidden)
        loss = _forward(hidden, weight, labels, bias, head, chunk_rows, grad_hidden)
        ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), None, None, None, None, None


def _recomputed(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    head: _Head,
    chunk_rows: int,
) -> torch.Tensor:
    """Return the loss with gradients for the head too: each chunk is made again in the backward."""

    def chunk_loss(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head.logits(h, w, bias), y, reduction="sum")

    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_rows):
        h, y = hidden[start : start + chunk_rows], labels[start : start + chunk_rows]
        loss = loss + checkpoint(chunk_loss, h, weight, y, use_reentrant=False)
    return loss


def _default_chunk_rows(weight: torch.Tensor) -> int:
    rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    return max(rows, _MIN_CHUNK_ROWS_CUDA) if weight.is_cuda else rows


def _check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    if labels.is_cuda:
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"expected labels of -100 or from 0 to {vocab_size - 1}, got {low} to {high}",
            hint="the tokenizer has more tokens than the model: resize the embeddings",
        )
