"""One optimizer step: gradients over the micro-batches, a check, clipping, the update.

The loss is the sum over the supervised tokens of all micro-batches divided by their number, so how
a batch is cut into micro-batches changes nothing. A step that is not finite changes no parameter:
its clipping factor is NaN then, which the update understands. So the whole step is queued before
the host asks for loss and norm, which it gets once, together.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.data.loader import Batch
from halfbyte.memory.host_copy import HostBuffers
from halfbyte.optim.adamw import AdamW
from halfbyte.train.ahead import Ahead
from halfbyte.train.gradients import MEASURED, Gradients, NonFiniteError, StepResult
from halfbyte.train.loss import LanguageModel
from halfbyte.train.micro import cut
from halfbyte.train.rng import seed_micro_step

_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def train_step(
    model: LanguageModel,
    optimizer: AdamW,
    batches: Sequence[Batch],
    *,
    step: int,
    learning_rate: float,
    max_grad_norm: float,
    seed: int,
    ahead: Ahead | None = None,
) -> StepResult:
    """Do optimizer step `step` (counted from 0) on `batches`.

    Args:
        model: The model, in training mode.
        optimizer: Holds the parameters; its gradients are overwritten.
        batches: The micro-batches.
        step: Seeds dropout, with `seed`.
        learning_rate: For this step.
        max_grad_norm: Longer gradients are scaled down to it; 0 means never.
        seed: Of the run.
        ahead: Where the batches come from, if the next step's are to be made ready meanwhile.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing was updated.
    """
    gradients = compute_gradients(
        model, optimizer, batches, step=step, seed=seed, max_grad_norm=max_grad_norm, ahead=ahead
    )
    optimizer.step(learning_rate, grad_scale=gradients.scale)
    return wait_for(
        gradients, model, optimizer, seed=seed, max_grad_norm=max_grad_norm, ahead=ahead
    )


def compute_gradients(
    model: LanguageModel,
    optimizer: AdamW,
    batches: Sequence[Batch],
    *,
    step: int,
    seed: int,
    max_grad_norm: float = 0.0,
    max_tokens: int | None = None,
    ahead: Ahead | None = None,
) -> Gradients:
    """Queue all of a step but the update: the optimizer then holds the gradient of the mean loss.

    Whatever gradients it held before are forgotten, so a call that failed can be repeated, with
    smaller `max_tokens` too: how the batches are cut changes nothing. A step that was queued
    `ahead` is not queued again.
    """
    begun = None if ahead is None else ahead.begun(model, batches, max_tokens)
    if begun is not None:
        return begun
    find = cut if ahead is None else ahead.micro_steps
    micro_steps = find(model, batches, max_tokens)
    supervised = sum(batch.num_supervised for batch in batches)
    optimizer.zero_grad()
    losses = []
    for micro_step in micro_steps:
        seed_micro_step(seed, step, micro_step.index)
        loss = model.loss_sum(
            *micro_step.batches, first_token=micro_step.first_token, packed=micro_step.packed
        )
        loss = loss / max(supervised, 1)
        loss.backward()
        losses.append(loss.detach())
        # Its graph ends here: the next may be recorded, which nodes of an older one would spoil.
        del loss
    optimizer.prefetch()  # beside the norm
    norm = optimizer.grad_norm()
    measured = torch.stack([*(loss.to(norm.device) for loss in losses), norm])
    on_host = HostBuffers().copy({MEASURED: measured})
    groups = [micro_step.batches for micro_step in micro_steps]
    return Gradients(clip_factor(measured, max_grad_norm), on_host, step, batches, groups)


def wait_for(
    gradients: Gradients,
    model: LanguageModel,
    optimizer: AdamW,
    *,
    seed: int,
    max_grad_norm: float,
    max_tokens: int | None = None,
    ahead: Ahead | None = None,
) -> StepResult:
    """Wait for a step whose update is queued, and return what was measured.

    Meanwhile the next step is made ready, `ahead`, and where the device works beside the host all
    of it but the update is queued, as `compute_gradients` with these arguments will want it.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing was updated.
    """
    if ahead is not None:
        ahead.look(model, gradients.step + 1, max_tokens)
        ahead.begin(
            gradients.step + 1,
            functools.partial(
                compute_gradients, model, optimizer, seed=seed, max_grad_norm=max_grad_norm,
                max_tokens=max_tokens, ahead=ahead,
            ),
        )  # fmt: skip
    try:
        return gradients.result()
    except NonFiniteError:
        optimizer.take_back()
        raise


def clip_factor(measured: Tensor, max_grad_norm: float) -> Tensor:
    """Return what scales a gradient down to the largest norm allowed: float32 `[]`, 1 at most.

    Args:
        measured: `[n + 1]`, the losses and the gradient's norm; where one of them is not finite,
            so is not what is returned: NaN.
        max_grad_norm: 0 allows all.
    """
    norm = measured[-1].double()
    factor = torch.ones_like(norm)
    if max_grad_norm > 0:
        factor = (max_grad_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)
    return torch.where(measured.isfinite().all(), factor, math.nan).float()
