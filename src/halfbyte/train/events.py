"""What a run tells its listeners: small values, passed to plain callables.

A listener is any function of one event; it looks at the kinds it cares for. Display, metrics file
and experiment trackers are listeners, and users add their own: `train(..., listeners=[print])`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.data.summary import Summary


@dataclass(frozen=True)
class TrainingStarted:
    """The run is set up; `first_step` steps are already done (more than 0 on resume)."""

    output_dir: Path
    first_step: int
    total_steps: int
    steps_per_epoch: int
    train_rows: int
    eval_rows: int
    trainable_parameters: int
    total_parameters: int
    data: Summary | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class StepFinished:
    """One optimizer step, or several averaged.

    Attributes:
        step: Steps done, this one included.
        epoch: Passes over the data so far.
        loss: Mean over the supervised tokens.
        grad_norm: Before clipping.
        tokens: Real tokens of this step.
        seconds: Time of this step, without evaluation and saving.
        memory_bytes: Peak of the process: the allocator's on a GPU, the resident set on a CPU.
        allocated_bytes: In tensors on the device, after the step.
        reserved_bytes: What its allocator holds for tensors.
        paged_bytes: Optimizer state that is in host memory.
        host_bytes: Main memory of the process.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    supervised_tokens: int
    tokens: int
    seconds: float
    memory_bytes: int
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    paged_bytes: int = 0
    host_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class StepSkipped:
    """A step's loss or gradient was not finite, and the run goes on without it.

    Attributes:
        step: Steps done, this one included.
        reason: What was not finite, and in which rows.
        rows: Their numbers, from 0.
        skipped_steps: Steps left out so far, this one included.
        max_skipped_steps: How many may be.
    """

    step: int
    reason: str
    rows: tuple[int, ...]
    skipped_steps: int
    max_skipped_steps: int


@dataclass(frozen=True)
class MemoryShort:
    """Memory ran out in a step, which then went through with less; so do the steps after it.

    Attributes:
        step: Steps done, this one included; 0 for the rehearsal before the first.
        measures: What was given up, in order.
        max_tokens: Most tokens in a micro-step from now on; None where none was cut.
    """

    step: int
    measures: tuple[str, ...]
    max_tokens: int | None


@dataclass(frozen=True)
class Evaluated:
    """The held-out rows were evaluated after `step` steps."""

    step: int
    epoch: float
    loss: float
    perplexity: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is whole and in its place; `seconds` is how long that took, beside training."""

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True)
class HealthFinding:
    """Something in the run's numbers that a person should look at.

    Attributes:
        step: Steps done when it was seen.
        name: What kind it is; each is told once.
        what: What was measured.
        cause: What is likely behind it.
        advice: The change to try.
    """

    step: int
    name: str
    what: str
    cause: str
    advice: str


@dataclass(frozen=True)
class Notice:
    """Something that the user should know, once."""

    message: str


@dataclass(frozen=True)
class TrainResult:
    """What a finished run achieved.

    Attributes:
        steps: Optimizer steps.
        loss: Training loss, mean over all supervised tokens of the run.
        eval_loss: On the held-out rows at the end, where there are any.
        seconds: In training steps, over all parts of a resumed run.
        tokens: Real tokens trained on.
        tokens_per_second: Their quotient.
        peak_bytes: Largest memory: the allocator's on a GPU, the resident set on a CPU.
        output_dir: Where the adapter is.
        peak_by_owner: Bytes of the peak on a GPU; empty on a CPU.
        reserved_bytes: The most that a GPU's allocator held for tensors; 0 on a CPU.
        paged_bytes: Optimizer state that was in host memory at the end.
        host_bytes: The most main memory of the process.
    """

    steps: int
    loss: float
    eval_loss: float | None
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_bytes: int
    output_dir: Path
    peak_by_owner: Mapping[str, int] = field(default_factory=dict)
    reserved_bytes: int = 0
    paged_bytes: int = 0
    host_bytes: int = 0


@dataclass(frozen=True)
class TrainingFinished:
    """The adapter is at `result.output_dir`."""

    result: TrainResult


@dataclass(frozen=True)
class TrainingStopped:
    """The run ended early: an error, or a signal."""

    reason: str


Event = (
    TrainingStarted
    | StepFinished
    | StepSkipped
    | MemoryShort
    | Evaluated
    | CheckpointSaved
    | HealthFinding
    | Notice
    | TrainingFinished
    | TrainingStopped
)
Listener = Callable[[Event], None]
