"""The next step: loaded, packed, sent to the GPU and queued there while it is busy with this one.

    host    queue update 1 ─ load, pack, send 2 ─ queue step 2 ─ wait for loss 1 ─ queue update 2
    GPU         step 1 ────────────────────────────► update 1 ─ step 2 ──────────────────────► ...

The host waits for a step's loss and norm once a step. What it does before it waits costs nothing;
what it does after it, the GPU would wait for. So by then the next step's gradients are queued, too:
they come after the update, which changes nothing where the step is not finite, and so they are the
right ones whatever the host will learn. Only their own update is queued after the wait.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from halfbyte.data.loader import Batch
from halfbyte.engine.graph import MAX_TOKENS
from halfbyte.train.gradients import Gradients
from halfbyte.train.loss import LanguageModel
from halfbyte.train.micro import MicroStep, cut


@dataclass(frozen=True)
class _Ready:
    """A step's batches, the micro-steps that a model and a limit made of them, their gradients."""

    step: int
    batches: Sequence[Batch]
    model: LanguageModel | None = None
    max_tokens: int | None = None
    micro_steps: Sequence[MicroStep] = ()
    gradients: Gradients | None = None

    def serves(self, model: LanguageModel, max_tokens: int | None) -> bool:
        """Whether the micro-steps are what this model and this limit would make."""
        return self.model is model and self.max_tokens == max_tokens


class Ahead:
    """Steps' batches, each ready before its step begins.

    Args:
        load: Returns the micro-batches of a step, counted from 0; it may be asked for a step twice.
        num_steps: Steps from this one on are not looked at.
        begins: Whether a step may be queued before the one before is waited for: where the device
            works beside the host, and nothing comes in between that would wait for it. Steps of
            more than `MAX_TOKENS` tokens never are: they are long, the host's part is not seen in
            them, and news of a step would come a step late.
    """

    def __init__(
        self,
        load: Callable[[int], Sequence[Batch]],
        num_steps: int,
        *,
        begins: Callable[[int], bool] | None = None,
    ) -> None:
        self._load, self._num_steps = load, num_steps
        self._begins = begins or _never
        self._ready: dict[int, _Ready] = {}

    def batches(self, step: int) -> Sequence[Batch]:
        """Return the micro-batches of a step that begins now; what `load` raises, is raised."""
        ready = self._ready.get(step) or _Ready(step, self._load(step))
        self._ready = {step: ready}
        return ready.batches

    def micro_steps(
        self, model: LanguageModel, batches: Sequence[Batch], max_tokens: int | None
    ) -> Sequence[MicroStep]:
        """Return what `cut` returns, on the device already where nothing changed since `look`."""
        ready = self._find(batches)
        if ready is None or not ready.serves(model, max_tokens):
            return cut(model, batches, max_tokens)
        return ready.micro_steps

    def look(self, model: LanguageModel, step: int, max_tokens: int | None) -> None:
        """Get a step ready; to be called while the device is busy with the step before."""
        if step >= self._num_steps or step in self._ready:
            return
        # Whatever is wrong comes up again when the step begins: this one's update comes first.
        with contextlib.suppress(Exception):
            batches = self._load(step)
            pieces = [
                replace(piece, packed=model.prepare(piece.batches))
                for piece in cut(model, batches, max_tokens)
            ]
            self._ready[step] = _Ready(step, batches, model, max_tokens, pieces)

    def begin(self, step: int, compute: Callable[..., Gradients]) -> None:
        """Queue the gradients of a step that `look` made ready, behind the update of the last.

        Args:
            step: From 0.
            compute: Called with its batches and `step`.
        """
        ready = self._ready.get(step)
        if ready is None or ready.gradients is not None or not self._begins(step):
            return
        if sum(piece.num_tokens for piece in ready.micro_steps) > MAX_TOKENS:
            return
        try:
            self._ready[step] = replace(ready, gradients=compute(ready.batches, step=step))
        except Exception:  # noqa: BLE001 - as with `look`, it comes up when the step begins
            # Memory, as a rule. What failed half-way begins again from zero gradients, and what
            # did not fit here once is not tried here again.
            self._begins = _never

    def begun(
        self, model: LanguageModel, batches: Sequence[Batch], max_tokens: int | None
    ) -> Gradients | None:
        """Return the gradients that `begin` queued for these batches, once; None without any."""
        ready = self._find(batches)
        if ready is None or ready.gradients is None:
            return None
        self._ready[ready.step] = replace(ready, gradients=None)
        return ready.gradients if ready.serves(model, max_tokens) else None

    def _find(self, batches: Sequence[Batch]) -> _Ready | None:
        return next((r for r in self._ready.values() if r.batches is batches), None)


def _never(_: int) -> bool:
    return False
