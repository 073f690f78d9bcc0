"""One AdamW update of a flat parameter vector, in place.

With g the scaled gradient and t the step, counted from 1 (Loshchilov and Hutter, arXiv 1711.05101,
in torch.optim.AdamW's order: the decay comes first):

    p = p * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    p = p - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

The eight-bit form holds m and v as codes of bitsandbytes' dynamic maps (signed for m, unsigned
for v), each block of 256 with its largest magnitude (Dettmers et al., arXiv 2110.02861). The update
uses the float32 moments; only what is kept is rounded.

A gradient scale of NaN says that the gradient is not to be used: nothing changes then. Twin:
`adamw_triton`, one pass over it all.
"""

import math

import torch
from torch.optim.adamw import adamw as torch_adamw

from halfbyte.kernels import codebooks
from halfbyte.kernels.dispatch import accelerated

BLOCK_SIZE = 256
# Index of 0 in the signed map.
_SIGNED_ZERO = 127
# Elements that temporaries are made of at once.
_CHUNK = BLOCK_SIZE * 4096


@accelerated
@torch.no_grad()
def adamw_step_(  # noqa: PLR0913 - the state of AdamW and its settings
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | torch.Tensor = 1.0,
) -> None:
    """Update `param` and its moments, all flat float32 [n]; `grad` is read as grad * grad_scale.

    Args:
        param: Changed in place.
        grad: Left as it is.
        exp_avg: First moment, changed in place.
        exp_avg_sq: Second moment, changed in place.
        step: Number of this update, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, times the learning rate.
        grad_scale: Factor of the gradient, as of clipping; NaN changes nothing. A tensor is read
            where it is.
    """
    grad_scale = float(grad_scale)
    if math.isnan(grad_scale):
        return
    is_scaled = grad_scale != 1.0
    size = _CHUNK if is_scaled else max(param.numel(), 1)
    for start in range(0, param.numel(), size):
        chunk = slice(start, start + size)
        scaled = grad[chunk] * grad_scale if is_scaled else grad[chunk]
        torch_adamw(
            [param[chunk]],
            [scaled],
            [exp_avg[chunk]],
            [exp_avg_sq[chunk]],
            [],
            [torch.tensor(step - 1.0, dtype=torch.float32, device=param.device)],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )


@accelerated
@torch.no_grad()
def adamw8bit_step_(  # noqa: PLR0913 - the state of AdamW and its settings
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    absmax1: torch.Tensor,
    absmax2: torch.Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | torch.Tensor = 1.0,
) -> None:
    """Update `param` (float32 [n]) with moments of eight bits; see `adamw_step_` for the rest.

    Args:
        param: Changed in place.
        grad: Left as it is.
        exp_avg: Codes of the first moment, uint8 [n], changed in place. Zeros with `absmax1` zeros
            stand for a moment of zeros.
        exp_avg_sq: Codes of the second moment, uint8 [n], changed in place.
        absmax1: Scales of `exp_avg`, float32 [ceil(n / 256)], changed in place.
        absmax2: Scales of `exp_avg_sq`, likewise.
        step: Number of this update, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, times the learning rate.
        grad_scale: Factor of the gradient.
    """
    grad_scale = float(grad_scale)
    if math.isnan(grad_scale):
        return
    correction1, root_correction2 = 1.0 - beta1**step, math.sqrt(1.0 - beta2**step)
    signed = _Map(param.device, is_signed=True)
    unsigned = _Map(param.device, is_signed=False)
    for start in range(0, param.numel(), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        blocks = slice(start // BLOCK_SIZE, (start + _CHUNK) // BLOCK_SIZE)
        g = grad[chunk] * grad_scale
        m = signed.decode(exp_avg[chunk], absmax1[blocks]).mul_(beta1).add_(g, alpha=1.0 - beta1)
        v = unsigned.decode(exp_avg_sq[chunk], absmax2[blocks]).mul_(beta2)
        v.addcmul_(g, g, value=1.0 - beta2)
        denominator = (v.sqrt() / root_correction2).add_(eps)
        param[chunk].mul_(1.0 - lr * weight_decay)
        param[chunk].addcdiv_(m, denominator, value=-lr / correction1)
        signed.encode_(m, exp_avg[chunk], absmax1[blocks])
        unsigned.encode_(v, exp_avg_sq[chunk], absmax2[blocks])


class _Map:
    """A dynamic map on one device, with the thresholds between its values."""

    def __init__(self, device: torch.device, *, is_signed: bool) -> None:
        self.values = codebooks.dynamic_map(signed=is_signed).to(device)
        self.thresholds = codebooks.dynamic_thresholds(signed=is_signed).to(device)
        self.is_signed = is_signed

    def decode(self, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        """Return the float32 moment [n] of `codes` [n]."""
        return self.values[codes.int()] * absmax.repeat_interleave(BLOCK_SIZE)[: codes.numel()]

    def encode_(self, moment: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
        """Write the nearest codes and their scales; a moment that is not zero keeps its sign."""
        padded = torch.nn.functional.pad(moment, (0, -moment.numel() % BLOCK_SIZE))
        padded = padded.view(-1, BLOCK_SIZE)
        torch.amax(padded.abs(), dim=1, out=absmax)
        scaled = (padded / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()
        nearest = torch.bucketize(scaled, self.thresholds, out_int32=True)
        if self.is_signed:
            # As bitsandbytes: what would round to the zero in the middle from below stays negative.
            nearest -= ((scaled < 0) & (nearest == _SIGNED_ZERO)).int()
        codes.copy_(nearest[: codes.numel()])
