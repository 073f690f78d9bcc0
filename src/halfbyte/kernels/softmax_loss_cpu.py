"""The softmax loss of a chunk of logits on a CPU: a loop of `cpu_loops.c`, or few torch passes."""

import torch
from torch import Tensor

from halfbyte.kernels import native

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def softmax_loss_(
    logits: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    library = native.library()
    is_plain = bias is None and softcap is None and logits.is_contiguous()
    is_plain = is_plain and logits.dtype in _DTYPE_CODES
    if library is None or not is_plain or not _has_targets(logits, target):
        return torch_softmax_loss_(
            logits, target, bias=bias, logit_scale=logit_scale, softcap=softcap
        )
    target = target.contiguous()
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    library.hb_softmax_loss(
        logits.data_ptr(),
        target.data_ptr(),
        loss.data_ptr(),
        *logits.shape,
        logit_scale,
        _DTYPE_CODES[logits.dtype],
        torch.get_num_threads(),
    )
    return loss


def _has_targets(logits: Tensor, target: Tensor) -> bool:
    """Whether each row has a target among its columns; torch says what is wrong with others."""
    if target.dtype != torch.int64 or target.shape != logits.shape[:1] or target.numel() == 0:
        return False
    low, high = target.aminmax()
    return bool((low >= 0) & (high < logits.shape[1]))


def torch_softmax_loss_(
    logits: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Plain torch, in float32, in few passes over memory."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if bias is not None:
        z += bias
    if logit_scale != 1.0:
        z *= logit_scale
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    at_target = z.gather(1, target[:, None])
    # d c tanh(y / c) / dy = 1 - (z / c)^2
    slope = None if softcap is None else 1.0 - (z / softcap).square_()
    log_sum = torch.logsumexp(z, dim=1, keepdim=True)
    grad = z.sub_(log_sum).exp_()
    grad.scatter_add_(1, target[:, None], torch.full_like(at_target, -1.0))
    if slope is not None:
        grad *= slope
    logits.copy_(grad.mul_(logit_scale))
    return (log_sum - at_target).squeeze(1).float()
