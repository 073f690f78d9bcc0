"""What is recorded: windows averaged by tokens, and a file that survives crashes and resumes."""

import json
import math
import resource
import shutil

import pytest

from halfbyte.errors import CheckpointError
from halfbyte.train.events import Evaluated, Notice, StepFinished, TrainingStopped
from halfbyte.train.metrics import Averaged, MetricsFile, as_record


def step(number, loss=1.0, tokens=10, supervised=10, total=100):
    return StepFinished(
        number, total, number / 10, loss, 0.5, 1e-4, supervised, tokens, 2.0, 1 << 20
    )


def test_window_is_a_mean_over_tokens_and_not_over_steps():
    seen = []
    listener = Averaged(2, seen.append)
    listener(step(1, loss=1.0, supervised=30))
    listener(step(2, loss=5.0, supervised=10))
    (record,) = seen
    assert record.loss == pytest.approx(2.0)
    assert (record.step, record.supervised_tokens, record.tokens, record.seconds) == (
        2,
        40,
        20,
        4.0,
    )
    assert record.tokens_per_second == 5.0


def test_other_events_pass_and_the_last_window_is_not_lost():
    seen = []
    listener = Averaged(10, seen.append)
    listener(step(1))
    listener(Notice("hello"))
    listener(TrainingStopped("signal"))
    assert [type(event) for event in seen] == [Notice, StepFinished, TrainingStopped]


def test_last_step_is_always_recorded():
    seen = []
    listener = Averaged(10, seen.append)
    for number in range(1, 14):
        listener(step(number, total=13))
    assert [event.step for event in seen] == [10, 13]


def test_never_records_no_step():
    seen = []
    Averaged(0, seen.append)(step(1))
    assert seen == []


def test_file_has_a_json_object_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    listener = MetricsFile(path, first_step=0)
    listener(step(1, loss=2.5))
    listener(Notice("not a metric"))
    listener(Evaluated(1, 0.1, 2.0, math.e**2, 7, 0.5))
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["event"] == "step"
    assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "time"} <= first.keys()
    assert {"supervised_tokens", "tokens_per_second", "memory_bytes", "seconds"} <= first.keys()
    assert (second["event"], second["loss"]) == ("evaluation", 2.0)


def test_infinite_perplexity_is_null():
    assert as_record(Evaluated(1, 0.1, 800.0, math.inf, 7, 0.5))["perplexity"] is None


def test_resuming_keeps_what_was_done_and_drops_what_is_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    listener = MetricsFile(path, first_step=0)
    for number in range(1, 6):
        listener(step(number))
    with path.open("a") as file:
        file.write('{"event": "step", "st')  # the crash came here
    MetricsFile(path, first_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_case_71_lines_wait_for_room(tmp_path, monkeypatch):
    path, warnings = tmp_path / "metrics.jsonl", []
    listener = MetricsFile(path, first_step=0, warn=warnings.append)
    listener(step(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, before[1]))
        listener(step(2))
        listener(step(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text().endswith("\n")  # never a part of a line
    listener(step(4))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert len(warnings) == 1
    assert "training goes on" in warnings[0]


def test_directory_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "out").mkdir()
    listener = MetricsFile(tmp_path / "out" / "metrics.jsonl", first_step=0)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(CheckpointError, match="No such file"):
        listener(step(1))


def test_lines_that_a_power_cut_spoilt_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\x00\n[]\n{"step": 2}\n')
    MetricsFile(path, first_step=5)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path, first_step=0)
    assert path.read_text() == ""
