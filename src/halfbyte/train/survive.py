"""Steps that memory cannot end: when it runs out, room is made and the step is done again.

What is tried, each for good, until the step goes through:

    1. recorded CUDA graphs are dropped, whose memory nothing else can use
    2. cached memory in pieces is given back (fragmentation)
    3. pages of optimizer state go to the host (first of all, where they had come back from there)
    4. more of the forward is computed again in the backward: half as much is saved, then the least,
       with inputs of layers in host memory
    5. MLPs run over smaller and smaller tiles of tokens
    6. micro-batches are cut in half, as often as they can be

The gradients begin again from zero, so nothing half-added is left; dropout is seeded by the step
and micro-step, so the masks are the same; the loss is a sum over tokens, so the update is too. An
optimizer update that ran out of memory goes on with the pages that are not updated yet.
"""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

from halfbyte.data.loader import Batch
from halfbyte.device import release_unused_memory
from halfbyte.engine.body import FusedBody
from halfbyte.errors import ConfigError, DeviceError
from halfbyte.memory.activations import checkpoint_activations
from halfbyte.memory.shortage import Shortage, is_out_of_memory
from halfbyte.optim.adamw import AdamW
from halfbyte.train.ahead import Ahead
from halfbyte.train.events import MemoryShort
from halfbyte.train.gradients import Gradients, StepResult
from halfbyte.train.loss import LanguageModel
from halfbyte.train.micro import cut
from halfbyte.train.step import compute_gradients, wait_for

_T = TypeVar("_T")

# Restarts with nothing but defragmented memory; a run that needs more has too little of it.
_MAX_DEFRAGMENTATIONS = 3


class Survivor:
    """Does optimizer steps, and keeps the settings under which the last one went through.

    Args:
        model: The model, in training mode.
        optimizer: Holds the parameters.
        tell: Called with a `MemoryShort` after a step that needed room.
        explain: Makes the error of a step that cannot be done, from what was measured.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: AdamW,
        *,
        tell: Callable[[MemoryShort], None],
        explain: Callable[[Shortage], DeviceError],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.max_tokens: int | None = None
        self._tell = tell
        self._explain = explain
        self._defragmentations = 0

    def step(
        self,
        batches: Sequence[Batch],
        *,
        step: int,
        learning_rate: float,
        max_grad_norm: float,
        seed: int,
        ahead: Ahead | None = None,
    ) -> StepResult:
        """Do optimizer step `step` (counted from 0); see `train_step`.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; nothing was updated.
            DeviceError: the step does not fit, whatever is given up.
        """
        measures: list[str] = []

        def attempt() -> Gradients:
            return compute_gradients(
                self.model, self.optimizer, batches, step=step, seed=seed,
                max_grad_norm=max_grad_norm, max_tokens=self.max_tokens, ahead=ahead,
            )  # fmt: skip

        gradients = self._persist(attempt, lambda s: self._make_room(s, batches), measures)
        self._persist(
            lambda: self.optimizer.step(learning_rate, grad_scale=gradients.scale),
            self._evict,
            measures,
        )
        result = wait_for(
            gradients, self.model, self.optimizer, seed=seed, max_grad_norm=max_grad_norm,
            max_tokens=self.max_tokens, ahead=ahead,
        )  # fmt: skip
        if measures:
            self._tell(MemoryShort(step + 1, tuple(measures), self.max_tokens))
        return result

    def rehearse(self, batches: Sequence[Batch], *, seed: int) -> None:
        """Do all of a step but the update and forget it, so that room is made before it matters.

        Raises:
            NonFiniteError: the loss or the gradient is not finite.
            DeviceError: the step does not fit, whatever is given up.
        """
        measures: list[str] = []
        gradients = self._persist(
            lambda: compute_gradients(
                self.model, self.optimizer, batches, step=0, seed=seed, max_tokens=self.max_tokens
            ),
            lambda shortage: self._make_room(shortage, batches),
            measures,
        )
        gradients.result()
        self.optimizer.zero_grad()
        if measures:
            self._tell(MemoryShort(0, tuple(measures), self.max_tokens))

    def _persist(
        self,
        attempt: Callable[[], _T],
        make_room: Callable[[Shortage], str | None],
        measures: list[str],
    ) -> _T:
        """Return what `attempt` returns once there is room for it."""
        device = next(self.model.model.parameters()).device
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                shortage = Shortage.measure(device, error)
            # Only out here are the failed attempt's tensors let go, with the error's traceback.
            gc.collect()
            release_unused_memory(device)
            measure = make_room(shortage.after_cleanup())
            if measure is None:
                raise self._explain(shortage)
            measures.append(measure)

    def _make_room(self, shortage: Shortage, batches: Sequence[Batch]) -> str | None:
        """Give something up for memory and say what; None where there is nothing left."""
        # What came back must not cost what there was room for while it was away.
        came_back = self._evict(shortage) if self.optimizer.has_come_back else None
        return (
            came_back
            or self._drop_graphs(shortage)
            or self._defragment(shortage)
            or self._evict(shortage)
            or self._recompute(shortage)
            or self._tile(batches)
            or self._split(batches)
        )

    def _drop_graphs(self, shortage: Shortage) -> str | None:
        body = self.model.body
        if not isinstance(body, FusedBody) or not body.stop_recording():
            return None
        release_unused_memory(shortage.device)
        return "records no CUDA graphs"

    def _defragment(self, shortage: Shortage) -> str | None:
        if not shortage.is_fragmented or self._defragmentations == _MAX_DEFRAGMENTATIONS:
            return None
        self._defragmentations += 1
        return f"gave {shortage.cached_bytes / 2**30:.2f} GiB of fragments back"

    def _evict(self, shortage: Shortage) -> str | None:
        freed = self.optimizer.evict()
        release_unused_memory(shortage.device)
        return f"moved {freed / 2**20:.0f} MiB of optimizer state to the host" if freed else None

    def _recompute(self, shortage: Shortage) -> str | None:
        body = self.model.body
        if not isinstance(body, FusedBody):
            return self._checkpoint()
        if body.memory == "lean":
            return None
        budget = shortage.activation_bytes // 2
        if isinstance(body.memory, int) or not budget:
            self.model = self.model.with_memory("lean")
            return "computes every layer twice"
        self.model = self.model.with_memory(budget)
        return f"saves activations within {budget / 2**30:.2f} GiB"

    def _checkpoint(self) -> str | None:
        model = self.model.model
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            return None
        try:
            checkpoint_activations(model)
        except ConfigError:
            return None
        return "computes every layer twice"

    def _tile(self, batches: Sequence[Batch]) -> str | None:
        body = self.model.body
        if not isinstance(body, FusedBody):
            return None
        tile = body.smaller_tile(self._longest(batches, self.max_tokens))
        if tile is None:
            return None
        self.model = self.model.with_memory(body.memory, max_tile=tile)
        return f"runs MLPs over {tile:,} tokens at a time"

    def _split(self, batches: Sequence[Batch]) -> str | None:
        longest = self._longest(batches, self.max_tokens)
        limit = longest
        while limit > 1:
            limit //= 2
            if (now := self._longest(batches, limit)) < longest:
                self.max_tokens = now
                return f"cuts micro-batches to {now:,} tokens"
        return None

    def _longest(self, batches: Sequence[Batch], max_tokens: int | None) -> int:
        pieces = cut(self.model, batches, max_tokens)
        return max((piece.num_tokens for piece in pieces), default=0)
