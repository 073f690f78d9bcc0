"""Experiment trackers (TensorBoard, Weights & Biases, ...) as listeners, through accelerate."""

from halfbyte.errors import ConfigError
from halfbyte.train.config import TrainConfig
from halfbyte.train.events import (
    Event,
    Listener,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
)
from halfbyte.train.metrics import as_record, settings_of


def make_trackers(config: TrainConfig, run_name: str) -> list[Listener]:
    """Return a listener for each tracker in `report_to`.

    Raises:
        ConfigError: a tracker's package is not installed, or it refuses to start.
    """
    return [_Tracker(name, config, run_name) for name in config.report_to]


class _Tracker:
    """Sends steps and evaluations to one tracker."""

    def __init__(self, name: str, config: TrainConfig, run_name: str) -> None:
        # accelerate's trackers import their package when they start, not before
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        options = {}
        if tracker_class.requires_logging_directory:
            options["logging_dir"] = config.output_dir
        try:
            self._tracker = tracker_class(run_name, **options)
            self._tracker.start()
        except ImportError as error:
            raise ConfigError(
                f"report_to: {name} needs a package that is not installed ({error})",
                hint=f"pip install {name.replace('_', '-')}, or set report_to: none",
            ) from error

    def __call__(self, event: Event) -> None:
        if isinstance(event, TrainingStarted):
            self._tracker.store_init_configuration(settings_of(event))
        elif isinstance(event, TrainingFinished | TrainingStopped):
            self._tracker.finish()
        record = as_record(event)
        if record is not None:
            prefix = "eval" if record.pop("event") == "evaluation" else "train"
            step = record.pop("step")
            values = {f"{prefix}/{k}": v for k, v in record.items() if v is not None}
            self._tracker.log(values, step=step)
