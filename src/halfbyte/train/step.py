"""One optimizer step: gradients over the micro-batches, a check, clipping, the update.

The loss is the sum over the supervised tokens of all micro-batches divided by their number, so how
a batch is cut into micro-batches changes nothing. A step that is not finite changes no parameter:
its clipping factor is NaN then, which the update understands. So the whole step is queued before
the host asks for loss and norm, which it gets once, together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.data.loader import Batch
from halfbyte.errors import TrainingError
from halfbyte.optim.adamw import AdamW
from halfbyte.train.ahead import Ahead
from halfbyte.train.host_copy import HostBuffers, HostCopy
from halfbyte.train.loss import LanguageModel
from halfbyte.train.micro import cut
from halfbyte.train.rng import seed_micro_step

_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_
_NUM_LISTED = 16
_MEASURED = "losses and norm"


class NonFiniteError(TrainingError):
    """A step's loss or gradient is NaN or Inf; nothing was updated.

    Attributes:
        what: What is not finite, and in which rows.
        rows: Their numbers, from 0; empty where not known.
    """

    def __init__(self, step: int, what: str, rows: Sequence[int]) -> None:
        self.what = what
        self.rows = tuple(rows)
        super().__init__(
            f"step {step + 1}: {what}; nothing was updated or saved",
            hint="check these rows, lower learning_rate, or set max_skipped_steps to go on without "
            "such steps; resume_from_checkpoint: auto goes on from the last checkpoint",
        )


@dataclass(frozen=True)
class StepResult:
    """What one step measured.

    Attributes:
        loss: Mean over the supervised tokens, before the update.
        grad_norm: 2-norm of the gradient, before clipping.
        supervised_tokens: Tokens that the loss is a mean over.
        tokens: All real tokens.
    """

    loss: float
    grad_norm: float
    supervised_tokens: int
    tokens: int


@dataclass(frozen=True)
class Gradients:
    """A step's gradients, which the device may still be making.

    Attributes:
        scale: float32 `[]` on the device, what clips the gradient; NaN where it is not to be used.
        measured: The losses of the micro-steps and the gradient's norm, on their way to the host.
        step: From 0.
        batches: All of the step.
        groups: The same as they went through the model, a group a micro-step.
    """

    scale: Tensor
    measured: HostCopy
    step: int
    batches: Sequence[Batch]
    groups: Sequence[Sequence[Batch]]

    def result(self) -> StepResult:
        """Wait for the device, and return what it found.

        Raises:
            NonFiniteError: the loss or the gradient is not finite.
        """
        *losses, grad_norm = self.measured.wait()[_MEASURED].tolist()
        _check_finite(losses, grad_norm, self.groups, self.step)
        supervised = sum(batch.num_supervised for batch in self.batches)
        tokens = sum(batch.num_tokens for batch in self.batches)
        return StepResult(sum(losses), grad_norm, supervised, tokens)


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
    return wait_for(gradients, model, optimizer, ahead=ahead)


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
    smaller `max_tokens` too: how the batches are cut changes nothing.
    """
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
    on_host = HostBuffers().copy({_MEASURED: measured})
    groups = [micro_step.batches for micro_step in micro_steps]
    return Gradients(clip_factor(measured, max_grad_norm), on_host, step, batches, groups)


def wait_for(
    gradients: Gradients,
    model: LanguageModel,
    optimizer: AdamW,
    *,
    max_tokens: int | None = None,
    ahead: Ahead | None = None,
) -> StepResult:
    """Wait for a step whose update is queued, and return what was measured.

    Meanwhile the next step is made ready, `ahead`, as `compute_gradients` will want it.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing was updated.
    """
    if ahead is not None:
        ahead.look(model, gradients.step + 1, max_tokens)
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


def _check_finite(
    losses: Sequence[float], grad_norm: float, groups: Sequence[Sequence[Batch]], step: int
) -> None:
    if all(map(math.isfinite, losses)) and math.isfinite(grad_norm):
        return
    bad = next((position for position, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is None:
        batches = [batch for group in groups for batch in group]
        what = f"the gradient norm is {grad_norm}"
    else:
        batches = list(groups[bad])
        tokens = sum(batch.num_tokens for batch in batches)
        where = f"micro-step {bad + 1} of {len(groups)} ({tokens} tokens)"
        what = f"the loss of {where} is {losses[bad]}"
    rows = [row for batch in batches for row in batch.rows]
    raise NonFiniteError(step, f"{what}, in {_name_rows(rows)}", rows)


def _name_rows(rows: Sequence[int]) -> str:
    """Name rows as people count them, from 1."""
    if not rows:
        return "rows without a number"
    numbers = sorted({row + 1 for row in rows})
    listed = ", ".join(map(str, numbers[:_NUM_LISTED]))
    more = f" and {len(numbers) - _NUM_LISTED} more" if len(numbers) > _NUM_LISTED else ""
    return f"{'rows' if len(numbers) > 1 else 'row'} {listed}{more} of the data"
