"""Cross-entropy of a linear head, without the logits of the whole batch.

The rows that carry a label are taken in chunks. A chunk's logits are made, turned into its loss
and, in place, into their own gradient, `softmax(z) - onehot(label)`, which times the head at once
becomes the gradient of the chunk's hidden states. So the backward pass has nothing left to do but
to scale, and memory holds one chunk of logits, however long the batch. The idea is that of Liger's
fused linear cross-entropy (arXiv 2410.10989).
"""

import dataclasses
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from halfbyte.errors import DataError
from halfbyte.kernels.softmax_loss import softmax_loss_

IGNORE_INDEX = -100

# Logits held at once, in the dtype of the head.
_CHUNK_BYTES = 32 * 2**20
# On a GPU the head is read once a chunk: with fewer rows memory would bound the matrix products.
_MIN_CHUNK_ROWS_CUDA = 1024


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    all_labelled: bool = False,
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
        all_labelled: No label is -100. Who knows that spares a GPU the wait for their number.

    Returns:
        float32 scalar; 0, with gradients of zeros, where no row has a label.

    Raises:
        DataError: A label is neither -100 nor in [0, V); checked on the CPU, CUDA asserts itself.
    """
    if not all_labelled:
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        if rows.numel() < labels.numel():
            hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    if labels.numel() == 0:
        return hidden.float().sum() + weight[:0].float().sum()
    _check_labels(labels, weight.shape[0])
    head = _Head(weight, bias, logit_scale, softcap, chunk_rows or _default_chunk_rows(weight))
    if not torch.is_grad_enabled():
        return head.loss(hidden, labels, None)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return head.recomputed_loss(hidden, labels)
    if hidden.requires_grad:
        return _LinearCrossEntropy.apply(hidden, labels, head)
    return head.loss(hidden, labels, None)


@dataclasses.dataclass(frozen=True)
class _Head:
    """The frozen part of the computation: the matrix, and what happens to the logits after it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None
    chunk_rows: int

    def loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, grad_hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the summed loss; write its gradient to `grad_hidden` where there is one."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], self.chunk_rows):
            chunk = slice(start, start + self.chunk_rows)
            logits = hidden[chunk] @ self.weight.T
            losses = softmax_loss_(
                logits,
                labels[chunk],
                bias=self.bias,
                logit_scale=self.logit_scale,
                softcap=self.softcap,
            )
            total += losses.sum()
            if grad_hidden is not None:
                # The logits are their own gradient by now.
                torch.mm(logits, self.weight, out=grad_hidden[chunk])
        return total

    def recomputed_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed loss, differentiable by the head too: chunks are made twice."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], self.chunk_rows):
            chunk = slice(start, start + self.chunk_rows)
            total = total + checkpoint(
                self._plain_loss, hidden[chunk], labels[chunk], use_reentrant=False
            )
        return total

    def _plain_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        z = torch.nn.functional.linear(hidden, self.weight).float()
        if self.bias is not None:
            z = z + self.bias
        z = z * self.logit_scale
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        return torch.nn.functional.cross_entropy(z, labels, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    """The head is frozen: the gradient of the hidden states is ready when the loss is."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: _Head) -> torch.Tensor:
        grad_hidden = torch.empty_like(hidden)
        loss = head.loss(hidden, labels, grad_hidden)
        ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_loss.to(grad_hidden.dtype), None, None


def _default_chunk_rows(weight: torch.Tensor) -> int:
    rows = max(1, _CHUNK_BYTES // (weight.element_size() * weight.shape[0]))
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
