"""Loss and gradient of a chunk of logits, in the logits' own memory."""

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated


@accelerated
def softmax_loss_(
    logits: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return each row's loss, and put the gradient of the rows' sum in the place of the logits.

    With z = softcap(logit_scale * (logits + bias)): loss = log sum exp z - z[target], and the
    gradient is (softmax z - onehot target) times the slope of z. float32 inside.

    Args:
        logits: `[n, V]`, products of hidden states and head; overwritten.
        target: int64 `[n]` in [0, V).
        bias: `[V]` or None.
        logit_scale: Factor of the logits.
        softcap: c of `c tanh(z / c)`, or None.

    Returns:
        float32 `[n]`.
    """
    with torch.enable_grad():
        leaf = logits.detach().to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        leaf.requires_grad_()
        z = (leaf if bias is None else leaf + bias) * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        loss = torch.nn.functional.cross_entropy(z, target, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
    logits.copy_(grad)
    return loss.detach().float()
