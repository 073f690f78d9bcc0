"""A step's gradients as the host sees them: queued, and later what was measured of them.

The device may still be making them. What they were made of stays beside them, so that a loss which
is not finite can be told by its rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from halfbyte.data.loader import Batch
from halfbyte.errors import TrainingError
from halfbyte.memory.host_copy import HostCopy

MEASURED = "losses and norm"
"""The name of what is on its way to the host."""
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
        *losses, grad_norm = self.measured.wait()[MEASURED].tolist()
        _check_finite(losses, grad_norm, self.groups, self.step)
        supervised = sum(batch.num_supervised for batch in self.batches)
        tokens = sum(batch.num_tokens for batch in self.batches)
        return StepResult(sum(losses), grad_norm, supervised, tokens)


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
