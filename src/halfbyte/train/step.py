"""One optimizer step: gradients over the micro-batches, a check, clipping, the update.

The loss is the sum over the supervised tokens of all micro-batches divided by their number, so how
a batch is cut into micro-batches changes nothing. Loss and gradient norm reach the host once,
together, before the update: a step that is not finite changes no parameter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from halfbyte.data.loader import Batch
from halfbyte.errors import TrainingError
from halfbyte.optim.adamw import AdamW
from halfbyte.train.ahead import Ahead
from halfbyte.train.loss import LanguageModel
from halfbyte.train.micro import cut
from halfbyte.train.rng import seed_micro_step

_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_
_NUM_LISTED = 16


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
    result = compute_gradients(model, optimizer, batches, step=step, seed=seed, ahead=ahead)
    scale = clip_factor(result.grad_norm, max_grad_norm)
    optimizer.step(learning_rate, grad_scale=scale)
    return result


def compute_gradients(
    model: LanguageModel,
    optimizer: AdamW,
    batches: Sequence[Batch],
    *,
    step: int,
    seed: int,
    max_tokens: int | None = None,
    ahead: Ahead | None = None,
) -> StepResult:
    """Do all of a step but the update: the optimizer then holds the gradient of the mean loss.

    Whatever gradients it held before are forgotten, so a call that failed can be repeated, with
    smaller `max_tokens` too: how the batches are cut changes nothing.

    Raises:
        NonFiniteError: the loss or the gradient is not finite.
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
    optimizer.prefetch()  # beside the norm, and while the host waits for it
    norm = optimizer.grad_norm()
    if ahead is not None:
        ahead.look(model, step + 1, max_tokens)
    *values, grad_norm = torch.stack(
        [*(loss.to(norm.device) for loss in losses), norm]
    ).tolist()  # the only sync
    _check_finite(values, grad_norm, [micro_step.batches for micro_step in micro_steps], step)
    return StepResult(
        sum(values), grad_norm, supervised, sum(batch.num_tokens for batch in batches)
    )


def clip_factor(grad_norm: float, max_grad_norm: float) -> float:
    """Return what scales a gradient of this norm down to the largest allowed; 0 allows all."""
    return min(1.0, max_grad_norm / (grad_norm + _CLIP_EPSILON)) if max_grad_norm > 0 else 1.0


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
