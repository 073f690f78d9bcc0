"""Experiment trackers (TensorBoard, Weights & Biases, ...) as listeners, through accelerate."""

from collections.abc import Callable

from halfbyte.errors import ConfigError
from halfbyte.train.config import TrainConfig
from halfbyte.train.events import (
    Event,
    HealthFinding,
    Listener,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
)
from halfbyte.train.metrics import as_record, settings_of

_PATIENCE = 3  # failures in a row after which a tracker is left alone


def make_trackers(
    config: TrainConfig, run_name: str, warn: Callable[[str], None]
) -> list[Listener]:
    """Return a listener for each tracker in `report_to`; what fails in one is told to `warn`.

    When the run starts, a tracker whose package is not installed is a ConfigError.
    """
    return [_Patient(name, _Tracker(name, config, run_name), warn) for name in config.report_to]


class _Patient:
    """A tracker whose failures end no run."""

    def __init__(self, name: str, tracker: Listener, warn: Callable[[str], None]) -> None:
        self._name, self._tracker, self._warn = name, tracker, warn
        self._failures = 0

    def __call__(self, event: Event) -> None:
        if self._failures >= _PATIENCE:
            return
        try:
            self._tracker(event)
            if as_record(event) is not None:
                self._failures = 0
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - its library and its network may raise anything
            self._failures += 1
            if self._failures in (1, _PATIENCE):
                ends = " and is left alone from now on" if self._failures == _PATIENCE else ""
                self._warn(f"the tracker {self._name} failed{ends}; training goes on: {error!r}")


class _Tracker:
    """Sends steps and evaluations to one tracker, which it starts with the run."""

    def __init__(self, name: str, config: TrainConfig, run_name: str) -> None:
        # accelerate's trackers import their package when they start, not before
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        options = {}
        if tracker_class.requires_logging_directory:
            options["logging_dir"] = config.output_dir
        self._name = name
        self._tracker = tracker_class(run_name, **options)

    def __call__(self, event: Event) -> None:
        if isinstance(event, TrainingStarted):
            self._start()
            self._tracker.store_init_configuration(settings_of(event))
        elif isinstance(event, TrainingFinished | TrainingStopped):
            self._tracker.finish()
        record = as_record(event)
        if record is not None:
            prefix = "eval" if record.pop("event") == "evaluation" else "train"
            step = record.pop("step")
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
            if isinstance(event, HealthFinding):
                numbers = {f"health_{event.name}": 1}
            self._tracker.log({f"{prefix}/{k}": v for k, v in numbers.items()}, step=step)

    def _start(self) -> None:
        try:
            self._tracker.start()
        except ImportError as error:
            raise ConfigError(
                f"report_to: {self._name} needs a package that is not installed ({error})",
                hint=f"pip install {self._name.replace('_', '-')}, or set report_to: none",
            ) from error
