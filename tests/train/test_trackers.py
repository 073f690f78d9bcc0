"""Trackers get steps and evaluations under the names that transformers gives them."""

import pytest
from accelerate import tracking

from halfbyte.errors import ConfigError
from halfbyte.train.config import TrainConfig
from halfbyte.train.events import HealthFinding, Notice
from halfbyte.train.loop import train
from halfbyte.train.trackers import make_trackers


class Recorder(tracking.GeneralTracker):
    """Stands in for a tracker whose package is not installed here."""

    name = "wandb"
    requires_logging_directory = False
    calls: list = []  # noqa: RUF012 - read by the test

    def __init__(self, run_name):
        super().__init__(_blank=True)
        self.calls.append(("init", run_name))

    @property
    def tracker(self):
        return self

    def start(self):
        self.calls.append(("start",))

    def store_init_configuration(self, values):
        self.calls.append(("settings", values))

    def log(self, values, step=None, **kwargs):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


def test_tracker_sees_the_whole_run(make_lora, tokenizer, rows_of, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    Recorder.calls.clear()
    config = TrainConfig(
        output_dir=str(tmp_path / "nightly"), max_steps=2, report_to="wandb", disable_tqdm=True
    )
    train(make_lora(), tokenizer, rows_of([9, 5]), config, eval_data=rows_of([9]))
    names = [call[0] for call in Recorder.calls]
    assert names == ["init", "start", "settings", "log", "log", "log", "finish"]
    assert Recorder.calls[0] == ("init", "nightly")
    assert Recorder.calls[2][1]["learning_rate"] == 2e-4
    _, values, step = Recorder.calls[4]
    assert step == 2
    assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= values.keys()
    assert "eval/loss" in Recorder.calls[5][1]


def test_missing_package_says_what_to_install(monkeypatch, tmp_path, make_lora, tokenizer, rows_of):
    class Missing(Recorder):
        def start(self):
            raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Missing)
    config = TrainConfig(output_dir=str(tmp_path / "out"), report_to="wandb", disable_tqdm=True)
    with pytest.raises(ConfigError, match=r"(?s)wandb needs a package.*hint: pip install wandb"):
        train(make_lora(), tokenizer, rows_of([9, 5]), config)


@pytest.mark.parametrize("failing", ["start", "store_init_configuration", "log", "finish"])
def test_tracker_that_fails_ends_no_run(
    failing, make_lora, tokenizer, rows_of, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    tracker = type("Failing", (Recorder,), {failing: fail})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", tracker)
    config = TrainConfig(
        output_dir=str(tmp_path / "out"), max_steps=6, report_to="wandb", disable_tqdm=True
    )
    notices = []

    def listen(event):
        if isinstance(event, Notice):
            notices.append(event.message)

    result = train(make_lora(), tokenizer, rows_of([9, 5]), config, listeners=[listen])
    assert result.steps == 6
    assert "the tracker wandb failed; training goes on" in notices[0]
    assert "no route to host" in notices[0]
    assert len(notices) == (2 if failing == "log" else 1)


def test_health_is_a_mark_at_its_step(monkeypatch, tmp_path):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    Recorder.calls.clear()
    config = TrainConfig(output_dir=str(tmp_path), report_to="wandb")
    (tracker,) = make_trackers(config, "run", print)
    tracker(HealthFinding(7, "flat_loss", "what", "cause", "advice"))
    assert Recorder.calls[-1] == ("log", {"train/health_flat_loss": 1}, 7)


def test_no_tracker_by_default(tmp_path):
    assert make_trackers(TrainConfig(output_dir=str(tmp_path)), "run", print) == []
