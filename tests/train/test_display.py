"""The display: plain lines where nobody watches, a live panel in a terminal."""

import io
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.train.display import duration, make_display, sparkline
from halfbyte.train.events import (
    CheckpointSaved,
    Evaluated,
    HealthFinding,
    Notice,
    StepFinished,
    StepSkipped,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
    TrainResult,
)

STARTED = TrainingStarted(Path("out"), 0, 4, 2, 1000, 10, 8192, 1_000_000, None, {})
RESULT = TrainResult(4, 1.25, 1.5, 90.0, 4000, 44.4, 3 << 30, Path("out"))


def step(number):
    return StepFinished(number, 4, number / 2, 2.0 / number, 0.5, 1e-4, 10, 100, 2.0, 1 << 30)


EVENTS = [
    STARTED,
    Notice("resumed [not markup]"),
    *(step(1), step(2)),
    Evaluated(2, 1.0, 1.5, 4.48, 10, 0.1),
    CheckpointSaved(2, Path("out/checkpoint-2"), 0.1),
    *(step(3), step(4)),
    TrainingFinished(RESULT),
]


def shown(events, *, terminal):
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=terminal, width=120)
    display = make_display(log_every=2, console=console)
    for event in events:
        display(event)
    return display, buffer.getvalue()


def test_plain_lines_say_everything_once():
    _, text = shown(EVENTS, terminal=False)
    assert text.splitlines() == [
        "1,000 rows, 4 steps; 8,192 trainable parameters (0.82%)",
        "note: resumed [not markup]",
        "step 2/4  epoch 1.00  loss 1.5000  grad_norm 0.500  lr 1.00e-04  50 tokens/s  "
        "1.00 GiB  4s left",
        "eval  step 2  loss 1.5000  perplexity 4.48",
        "saved out/checkpoint-2",
        "step 4/4  epoch 2.00  loss 0.5833  grad_norm 0.500  lr 1.00e-04  50 tokens/s  "
        "1.00 GiB  0s left",
        "done: 4 steps in 1m 30s, loss 1.2500, 44 tokens/s, peak 3.00 GiB; adapter: out",
    ]


def test_live_panel_shows_the_figures():
    _, text = shown(EVENTS, terminal=True)
    for part in ("0.5000", "gradient norm", "1.00e-04", "50", "1.00 GiB", "4/4", "perplexity 4.48"):
        assert part in text
    assert any(bar in text for bar in "▁█")


@pytest.mark.parametrize("terminal", [False, True])
def test_stopping_is_shown_and_the_terminal_given_back(terminal):
    _, text = shown([STARTED, step(1), TrainingStopped("stopped by SIGTERM")], terminal=terminal)
    assert "stopped by SIGTERM" in text
    if terminal:
        assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_stopping_before_the_start_breaks_nothing():
    _, text = shown([TrainingStopped("no rows")], terminal=True)
    assert "no rows" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_health_and_skipped_steps_are_shown(terminal):
    events = [
        STARTED,
        StepSkipped(1, "the loss is nan, in row 3 of the data", (2,), 1, 4),
        HealthFinding(2, "flat_loss", "the loss has not fallen", "too low a rate", "a higher one"),
        TrainingStopped("enough"),
    ]
    _, text = shown(events, terminal=terminal)
    assert "skipped step 1 (1 of at most 4): the loss is nan, in row 3 of the data" in text
    assert "health: the loss has not fallen (step 2)." in text
    assert "likely cause: too low a rate" in text
    assert "try: a higher one" in text


def test_reader_that_goes_away_ends_nothing():
    """`halfbyte train 2>&1 | head`: rich's own console would end the process."""
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        display = make_display(log_every=1)
        for event in EVENTS:
            display(event)


@pytest.mark.parametrize("terminal", [False, True])
def test_full_disk_behind_the_display_ends_nothing(terminal):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    display = make_display(log_every=1, console=Console(file=Full(), force_terminal=terminal))
    for event in EVENTS:
        display(event)


def test_sparkline_averages_down_to_its_width():
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([]) == ""
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert len(sparkline(list(range(1000)), width=40)) == 40


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59, "59s"), (200, "3m 20s"), (7500, "2h 05m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
