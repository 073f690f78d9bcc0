"""Metrics as JSON lines, one object an event, and the averaging of steps between two records."""

import dataclasses
import errno
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte.errors import CheckpointError
from halfbyte.train.directory import disk_errors, replacing
from halfbyte.train.events import (
    Evaluated,
    Event,
    HealthFinding,
    Listener,
    MemoryShort,
    StepFinished,
    StepSkipped,
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
    """Appends what can be counted to a JSON lines file.

    A disk that does not take a line is told of once; the line is kept and tried again with the
    next one. Where the directory is gone, so is the run's.

    Args:
        path: The file; lines of steps after `first_step` are removed from it, as they are done
            again.
        first_step: Steps that are already done.
        warn: Called with what went wrong.
    """

    def __init__(
        self, path: Path, *, first_step: int, warn: Callable[[str], None] = warnings.warn
    ) -> None:
        self._path, self._warn = path, warn
        self._unwritten: list[bytes] = []
        kept = [line for line in _lines(path) if first_step and _step_of(line) <= first_step]
        with disk_errors(path), replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))

    def __call__(self, event: Event) -> None:
        """Append the event, if it is one that is recorded."""
        record = as_record(event)
        if record is None:
            return
        record["time"] = time.time()
        had_failed = bool(self._unwritten)
        self._unwritten.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        try:
            _append(self._path, b"".join(self._unwritten))
        except OSError as error:
            message = f"writing {self._path} failed: {error.strerror}"
            if not self._path.parent.is_dir():
                raise CheckpointError(message, hint="resume in a directory that stays") from error
            if not had_failed:
                self._warn(f"{message}; training goes on, and the lines are kept for later")
        else:
            self._unwritten.clear()


_RECORDED = {
    StepFinished: "step",
    StepSkipped: "skipped_step",
    Evaluated: "evaluation",
    HealthFinding: "health",
    MemoryShort: "memory",
}


def as_record(event: Event) -> dict[str, Any] | None:
    """Return an event that has a number as plain JSON values, `None` for other events."""
    kind = _RECORDED.get(type(event))
    if kind is None:
        return None
    record = {"event": kind, **dataclasses.asdict(event)}
    if isinstance(event, StepFinished):
        record["tokens_per_second"] = event.tokens_per_second
    return {name: _finite(value) for name, value in record.items()}


def _append(path: Path, content: bytes) -> None:
    """Append all of `content` or nothing."""
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        if file.write(content) < len(content):
            file.truncate(start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _finite(value: Any) -> Any:
    """JSON has no infinity, which is what the perplexity of a large loss is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[bytes]:
    """Return the lines of a metrics file."""
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _step_of(line: bytes) -> float:
    """Return a line's step; infinity where a crash left only a part of the line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def settings_of(event: TrainingStarted) -> dict[str, Any]:
    """Return the run's settings as trackers take them: numbers, strings and truth values."""
    plain = (bool, int, float, str)
    return {k: v if isinstance(v, plain) else str(v) for k, v in event.settings.items()}
