"""The next step's tokens: loaded, packed and sent to the GPU while it is busy with this step.

    host    queue step 1, update 1 ─ load, pack, send 2 ─ wait for loss 1 ─ queue step 2 ─ ...
    GPU             step 1 ─────────────────────────────────────► update 1 ─ step 2 ───────►

The host waits for a step's loss and norm before it begins the next; what it does before it waits
costs nothing, and what it does after it must be done before the update is.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from halfbyte.data.loader import Batch
from halfbyte.train.loss import LanguageModel
from halfbyte.train.micro import MicroStep, cut


@dataclass(frozen=True)
class _Ready:
    """A step's batches, and the micro-steps that a model and a limit made of them."""

    step: int
    batches: Sequence[Batch]
    model: LanguageModel | None = None
    max_tokens: int | None = None
    micro_steps: Sequence[MicroStep] = ()


class Ahead:
    """Steps' batches, each ready before its step begins.

    Args:
        load: Returns the micro-batches of a step, counted from 0; it may be asked for a step twice.
        num_steps: Steps from this one on are not looked at.
    """

    def __init__(self, load: Callable[[int], Sequence[Batch]], num_steps: int) -> None:
        self._load, self._num_steps = load, num_steps
        self._now: _Ready | None = None
        self._next: _Ready | None = None

    def batches(self, step: int) -> Sequence[Batch]:
        """Return the micro-batches of a step that begins now; what `load` raises, is raised."""
        if self._next is not None and self._next.step == step:
            self._now = self._next
        else:
            self._now = _Ready(step, self._load(step))
        self._next = None
        return self._now.batches

    def micro_steps(
        self, model: LanguageModel, batches: Sequence[Batch], max_tokens: int | None
    ) -> Sequence[MicroStep]:
        """Return what `cut` returns, on the device already where nothing changed since `look`."""
        now = self._now
        if now is None or now.batches is not batches:
            return cut(model, batches, max_tokens)
        is_as_cut = now.model is model and now.max_tokens == max_tokens
        return now.micro_steps if is_as_cut else cut(model, batches, max_tokens)

    def look(self, model: LanguageModel, step: int, max_tokens: int | None) -> None:
        """Get a step ready; to be called while the device is busy with the step before."""
        if step >= self._num_steps or (self._next is not None and self._next.step == step):
            return
        # Whatever is wrong comes up again when the step begins: this one's update comes first.
        with contextlib.suppress(Exception):
            batches = self._load(step)
            pieces = [
                replace(piece, packed=model.prepare(piece.batches))
                for piece in cut(model, batches, max_tokens)
            ]
            self._next = _Ready(step, batches, model, max_tokens, pieces)
