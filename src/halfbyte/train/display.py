"""What a person sees of a run: a live panel in a terminal, plain lines everywhere else."""

import contextlib
import math
import os
from collections import deque
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from halfbyte.train.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    HealthFinding,
    Listener,
    MemoryShort,
    Notice,
    StepFinished,
    StepSkipped,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
)
from halfbyte.train.metrics import Averaged

_BARS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 40
_RATE_WINDOW = 20  # steps that the shown tokens/s and time left are averaged over


def make_display(*, log_every: int, console: Console | None = None) -> Listener:
    """Return a listener that draws on stderr: live in a terminal, else a line now and then.

    Nobody needs to be looking: a pipe that is closed or a full disk behind stderr ends no run.
    """
    console = console or QuietingConsole(stderr=True)
    live = LiveDisplay(console) if console.is_terminal else PlainLog(console)

    def listen(event: Event) -> None:
        with contextlib.suppress(OSError):
            live(event)

    return listen if console.is_terminal else Averaged(log_every, listen)


class QuietingConsole(Console):
    """A console that falls silent when its reader goes away; rich's ends the process."""

    def on_broken_pipe(self) -> None:
        """Print no more, nor what the stream still holds."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def sparkline(values: Sequence[float], width: int = _SPARKLINE_WIDTH) -> str:
    """Draw values as a line of bars, the newest on the right, averaged down to `width`."""
    if not values:
        return ""
    size = math.ceil(len(values) / width)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    means = [sum(group) / len(group) for group in groups]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def duration(seconds: float) -> str:
    """Write seconds as 42s, 3m 20s or 2h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class _Pace:
    """Tokens a second and time left, over the last steps (or windows of steps)."""

    def __init__(self) -> None:
        self._last_step = 0
        self._recent: deque[tuple[int, int, float]] = deque(maxlen=_RATE_WINDOW)

    def start(self, event: TrainingStarted) -> None:
        self._last_step = event.first_step

    def add(self, event: StepFinished) -> None:
        self._recent.append((event.step - self._last_step, event.tokens, event.seconds))
        self._last_step = event.step
        self._steps_left = event.total_steps - event.step

    def tokens_per_second(self) -> float:
        seconds = sum(seconds for _, _, seconds in self._recent)
        return sum(tokens for _, tokens, _ in self._recent) / seconds if seconds > 0 else 0.0

    def seconds_left(self) -> float:
        steps = sum(steps for steps, _, _ in self._recent)
        return self._steps_left * sum(seconds for _, _, seconds in self._recent) / steps


def _event_line(event: Event) -> str | None:
    """Return the line for an event that is not a step."""
    if isinstance(event, TrainingStarted):
        share = event.trainable_parameters / max(event.total_parameters, 1)
        resumed = f", resumed after step {event.first_step}" if event.first_step else ""
        tokens = ""
        if event.data is not None:
            train = event.data.train
            tokens = f", {train.total_tokens:,} tokens ({train.supervised_tokens:,} learned)"
        return (
            f"{event.train_rows:,} rows{tokens}, {event.total_steps:,} steps{resumed}; "
            f"{event.trainable_parameters:,} trainable parameters ({share:.2%})"
        )
    if isinstance(event, Evaluated):
        return f"eval  step {event.step}  loss {event.loss:.4f}  perplexity {event.perplexity:.2f}"
    if isinstance(event, CheckpointSaved):
        return f"saved {event.path}"
    if isinstance(event, HealthFinding):
        return (
            f"health: {event.what} (step {event.step}).\n"
            f"  likely cause: {event.cause}\n  try: {event.advice}"
        )
    if isinstance(event, Notice):
        return f"note: {event.message}"
    if isinstance(event, MemoryShort):
        when = f"in step {event.step}" if event.step else "before the first step"
        return f"memory ran out {when}; it went on with less: {'; '.join(event.measures)}"
    if isinstance(event, StepSkipped):
        count = f"{event.skipped_steps} of at most {event.max_skipped_steps}"
        return f"skipped step {event.step} ({count}): {event.reason}"
    if isinstance(event, TrainingStopped):
        return f"stopped: {event.reason}"
    if isinstance(event, TrainingFinished):
        result = event.result
        return (
            f"done: {result.steps:,} steps in {duration(result.seconds)}, loss {result.loss:.4f}, "
            f"{result.tokens_per_second:,.0f} tokens/s, peak {result.peak_bytes / 2**30:.2f} GiB"
            f"{_paged(result.paged_bytes)}; adapter: {result.output_dir}"
        )
    return None


def _paged(nbytes: int) -> str:
    return f" and {nbytes / 2**30:.2f} GiB paged out" if nbytes else ""


def _memory(event: StepFinished) -> str:
    """Say what the device holds, and what had to leave it."""
    sizes = {
        "peak": event.memory_bytes,
        "allocated": event.allocated_bytes,
        "reserved": event.reserved_bytes,
        "paged out": event.paged_bytes,
        "host": event.host_bytes,
    }
    return ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items() if size)


class PlainLog:
    """One line an event, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = _Pace()

    def __call__(self, event: Event) -> None:
        """Write the event's line."""
        if isinstance(event, TrainingStarted):
            self._pace.start(event)
        if isinstance(event, StepFinished):
            self._pace.add(event)
            line = (
                f"step {event.step}/{event.total_steps}  epoch {event.epoch:.2f}  "
                f"loss {event.loss:.4f}  grad_norm {event.grad_norm:.3f}  "
                f"lr {event.learning_rate:.2e}  {event.tokens_per_second:,.0f} tokens/s  "
                f"{event.memory_bytes / 2**30:.2f} GiB{_paged(event.paged_bytes)}  "
                f"{duration(self._pace.seconds_left())} left"
            )
        else:
            line = _event_line(event) or ""
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


class LiveDisplay:
    """A panel that is drawn over: progress, loss with its history, pace, memory."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._losses: list[float] = []
        self._pace = _Pace()
        self._evaluation = ""
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} left"),
            console=console,
            expand=True,
        )
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __call__(self, event: Event) -> None:
        """Take the event in and draw."""
        line = _event_line(event)
        if isinstance(event, TrainingStarted):
            self._pace.start(event)
            self._task = self._progress.add_task(
                "", total=event.total_steps, completed=event.first_step, left="?"
            )
            self._print(line)
            self._live.start()
        elif isinstance(event, StepFinished):
            self._losses.append(event.loss)
            self._pace.add(event)
            left = duration(self._pace.seconds_left())
            self._progress.update(self._task, completed=event.step, left=left)
            self._live.update(self._panel(event), refresh=True)
        elif isinstance(event, Evaluated):
            self._evaluation = f"{event.loss:.4f} (perplexity {event.perplexity:.2f})"
        elif isinstance(event, TrainingFinished | TrainingStopped):
            self._live.stop()
            self._print(line)
        elif line:
            self._print(line)

    def _print(self, line: str | None) -> None:
        self._console.print(line or "", highlight=False, markup=False)

    def _panel(self, event: StepFinished) -> Group:
        table = Table.grid(padding=(0, 3))
        table.add_row("loss", f"[bold]{event.loss:.4f}[/]  {sparkline(self._losses)}")
        table.add_row("gradient norm", f"{event.grad_norm:.3f}")
        table.add_row("learning rate", f"{event.learning_rate:.2e}")
        table.add_row("tokens/s", f"{self._pace.tokens_per_second():,.0f}")
        table.add_row("memory", _memory(event))
        if self._evaluation:
            table.add_row("held-out loss", self._evaluation)
        return Group(self._progress, table)
