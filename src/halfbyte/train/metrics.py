"""Metrics as JSON lines, one object an event, and the averaging of steps between two records."""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from halfbyte.errors import CheckpointError
from halfbyte.train.events import (
    Evaluated,
    Event,
    Listener,
    StepFinished,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
)


class Averaged:
    """Passes on every event, but of steps only each `every`-th and the last, averaged in between.

    The loss is the mean over all supervised tokens in between, tokens and seconds are sums, the
    gradient norm and the rest are the last step's. `every` of 0 passes on no step.
    """

    def __init__(self, every: int, listener: Listener) -> None:
        self._every = every
        self._listener = listener
        self._window: list[StepFinished] = []

    def __call__(self, event: Event) -> None:
        """Take the event in, or pass it on."""
        if not isinstance(event, StepFinished):
            if isinstance(event, TrainingFinished | TrainingStopped):
                self._flush()
            self._listener(event)
        elif self._every:
            self._window.append(event)
            if event.step % self._every == 0 or event.step == event.total_steps:
                self._flush()

    def _flush(self) -> None:
        if not self._window:
            return
        supervised = sum(event.supervised_tokens for event in self._window)
        total = sum(event.loss * event.supervised_tokens for event in self._window)
        self._listener(
            dataclasses.replace(
                self._window[-1],
                loss=total / max(supervised, 1),
                supervised_tokens=supervised,
                tokens=sum(event.tokens for event in self._window),
                seconds=sum(event.seconds for event in self._window),
            )
        )
        self._window.clear()


class MetricsFile:
    """Appends steps and evaluations to a JSON lines file.

    Args:
        path: The file; lines of steps after `first_step` are removed from it, as they are done
            again.
        first_step: Steps that are already done.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first_step]
        path.write_text("".join(kept if first_step else ()), encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Append the event, if it is a step or an evaluation."""
        record = as_record(event)
        if record is not None:
            record["time"] = time.time()
            line = json.dumps(record, allow_nan=False) + "\n"
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                raise CheckpointError(
                    f"writing {self._path} failed: {error.strerror}",
                    hint="make room or mend the directory, then resume",
                ) from error


def as_record(event: Event) -> dict[str, Any] | None:
    """Return a step or an evaluation as plain JSON values, `None` for other events."""
    if isinstance(event, StepFinished):
        record = {"event": "step", **dataclasses.asdict(event)}
        record["tokens_per_second"] = event.tokens_per_second
    elif isinstance(event, Evaluated):
        record = {"event": "evaluation", **dataclasses.asdict(event)}
    else:
        return None
    return {name: _finite(value) for name, value in record.items()}


def _finite(value: Any) -> Any:
    """JSON has no infinity, which is what the perplexity of a large loss is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[str]:
    """Return the whole lines of a metrics file; a crash may have left a part of the last one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def settings_of(event: TrainingStarted) -> dict[str, Any]:
    """Return the run's settings as trackers take them: numbers, strings and truth values."""
    plain = (bool, int, float, str)
    return {k: v if isinstance(v, plain) else str(v) for k, v in event.settings.items()}
