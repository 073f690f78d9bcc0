"""The learning rate as a pure function of the step.

The same numbers, step for step, as transformers' schedulers of the same names. Nothing is stored,
so a resumed run needs only to know which step comes next.
"""

import math
from collections.abc import Mapping
from typing import Protocol

from halfbyte.errors import ConfigError

SCHEDULES = ("constant", "constant_with_warmup", "cosine", "cosine_with_min_lr", "linear")


class ScheduleConfig(Protocol):
    """What a schedule needs to know, under transformers' names."""

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""

    @property
    def lr_scheduler_type(self) -> str:
        """One of `SCHEDULES`."""

    @property
    def lr_scheduler_kwargs(self) -> Mapping[str, float]:
        """`num_cycles`; for cosine_with_min_lr also `min_lr` or `min_lr_rate`."""

    @property
    def warmup_ratio(self) -> float:
        """Fraction of all steps that warm up."""

    @property
    def warmup_steps(self) -> float:
        """Steps that warm up; below 1 a fraction of all steps; 0 leaves it to `warmup_ratio`."""


def num_warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Return how many steps warm up: `warmup_steps` where it is set, else `warmup_ratio` of all."""
    if config.warmup_steps >= 1:
        return int(config.warmup_steps)
    return math.ceil(total_steps * (config.warmup_steps or config.warmup_ratio))


def learning_rate(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, out of `total_steps`.

    Raises:
        ConfigError: the schedule is unknown, or its arguments are.
    """
    kind, warmup = config.lr_scheduler_type, num_warmup_steps(total_steps, config)
    if kind not in SCHEDULES:
        raise ConfigError(f"expected lr_scheduler_type in {', '.join(SCHEDULES)}, got {kind!r}")
    if kind == "constant":  # transformers' constant schedule does not warm up
        return config.learning_rate
    if step < warmup:
        return config.learning_rate * (step / warmup)
    if kind == "constant_with_warmup":
        return config.learning_rate
    remaining = max(1, total_steps - warmup)
    if kind == "linear":
        return config.learning_rate * max(0.0, (total_steps - step) / remaining)
    return config.learning_rate * _cosine((step - warmup) / remaining, config)


def _cosine(progress: float, config: ScheduleConfig) -> float:
    """Return the cosine's factor at `progress` from 0 to 1, not below the minimum rate."""
    options = dict(config.lr_scheduler_kwargs)
    cycles = options.pop("num_cycles", 0.5)
    floor = 0.0
    if config.lr_scheduler_type == "cosine_with_min_lr":
        if ("min_lr" in options) == ("min_lr_rate" in options):
            raise ConfigError(
                "cosine_with_min_lr expects one of min_lr and min_lr_rate in lr_scheduler_kwargs, "
                f"got {sorted(config.lr_scheduler_kwargs)}",
                hint="lr_scheduler_kwargs: {min_lr_rate: 0.1} ends at a tenth of the peak",
            )
        absolute = options.pop("min_lr", None)
        floor = (
            options.pop("min_lr_rate", 0.0) if absolute is None else absolute / config.learning_rate
        )
    if options:
        raise ConfigError(
            f"unknown lr_scheduler_kwargs for {config.lr_scheduler_type}: {sorted(options)}"
        )
    factor = 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress))
    return max(0.0, factor * (1.0 - floor) + floor)
