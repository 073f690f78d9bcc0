"""Troubles are told once, in the events and the metrics; adapters are measured now and then."""

import json
from pathlib import Path

import torch

from halfbyte.train.config import TrainConfig
from halfbyte.train.events import HealthFinding, StepFinished, TrainingStarted
from halfbyte.train.health import HealthMonitor
from halfbyte.train.loop import train

RATE = 2e-4


def started(sources, first_step=0):
    train_part = type("Split", (), {"sources": sources})()
    summary = type("Summary", (), {"train": train_part})()
    return TrainingStarted(Path("out"), first_step, 10, 5, 10, 0, 1, 2, summary, {})


class NoProbe:
    measured = 0

    def measure(self):
        self.measured += 1

    def read(self):
        return None


def monitor(tell, log_every=1, probe=None):
    config = TrainConfig(learning_rate=RATE)
    return HealthMonitor(config, 1000, probe or NoProbe(), log_every=log_every, tell=tell)


def step(number, loss=1.0, norm=0.5):
    return StepFinished(number, 1000, 0.0, loss, norm, RATE, 10, 10, 1.0, 0)


def test_each_kind_is_told_once():
    told = []
    listen = monitor(told.append)
    for number in range(1, 40):
        listen(step(number, norm=20.0))
    assert [finding.name for finding in told] == ["gradient_norm"]
    assert told[0].step == 3


def test_adapters_are_measured_at_logging_steps_some_way_apart():
    probe = NoProbe()
    listen = monitor(print, log_every=4, probe=probe)
    for number in range(1, 41):
        listen(step(number))
    assert probe.measured == 3  # after steps 12, 24 and 36
    never = NoProbe()
    listen = monitor(print, log_every=0, probe=never)
    for number in range(1, 41):
        listen(step(number))
    assert never.measured == 0


def test_resumed_run_that_is_flat_has_converged():
    told = []
    listen = monitor(told.append)
    listen(started({}, first_step=500))
    for number in range(501, 701):
        listen(step(number))
    assert told == []


def test_real_run_says_so_in_the_log_and_the_metrics(make_lora, tokenizer, rows_of, tmp_path):
    """A layer that nothing reaches: its output is thrown away."""
    model = make_lora()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        layer.lora_A["default"].weight.zero_()  # A = 0 and B = 0: neither ever has a gradient
    events = []
    config = TrainConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=32,
        per_device_train_batch_size=2,
        disable_tqdm=True,
    )
    train(model, tokenizer, rows_of([5, 9, 6, 7]), config, listeners=[events.append])
    findings = [event for event in events if isinstance(event, HealthFinding)]
    (dead,) = [finding for finding in findings if finding.name == "dead_adapters"]
    assert "1 of 14 adapters" in dead.what
    assert "model.layers.1.mlp.down_proj" in dead.what
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert dead.advice in [line["advice"] for line in lines if line["event"] == "health"]
