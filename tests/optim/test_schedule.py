"""The learning rate is transformers', step for step."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import get_scheduler

from halfbyte.errors import ConfigError
from halfbyte.optim.schedule import learning_rate, num_warmup_steps


@dataclass
class Settings:
    lr_scheduler_type: str = "cosine"
    learning_rate: float = 2e-4
    lr_scheduler_kwargs: dict = field(default_factory=dict)
    warmup_ratio: float = 0.0
    warmup_steps: float = 0


def transformers_rates(settings, total, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    scheduler = get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=settings.lr_scheduler_kwargs or None,
    )
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7, 37])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 3e-5}),
    ],
)
def test_equals_transformers_at_every_step(kind, options, warmup):
    settings = Settings(kind, lr_scheduler_kwargs=options, warmup_steps=warmup)
    rates = [learning_rate(step, 37, settings) for step in range(37)]
    assert rates == pytest.approx(transformers_rates(settings, 37, warmup), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("steps", "ratio", "expected"),
    [(0, 0.03, 4), (10, 0.03, 10), (0.1, 0.0, 11), (0, 0, 0), (1, 0.5, 1)],
)
def test_warmup_takes_steps_a_fraction_or_a_ratio(steps, ratio, expected):
    assert num_warmup_steps(101, Settings(warmup_steps=steps, warmup_ratio=ratio)) == expected


def test_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ConfigError, match="cosine, cosine_with_min_lr, linear, got 'polynomial'"):
        learning_rate(0, 10, Settings("polynomial"))


@pytest.mark.parametrize("options", [{}, {"min_lr": 1e-5, "min_lr_rate": 0.1}])
def test_minimum_rate_must_be_given_once(options):
    with pytest.raises(ConfigError, match="one of min_lr and min_lr_rate"):
        learning_rate(5, 10, Settings("cosine_with_min_lr", lr_scheduler_kwargs=options))


def test_unknown_schedule_argument_is_an_error():
    with pytest.raises(ConfigError, match=r"unknown lr_scheduler_kwargs for cosine: .'power'"):
        learning_rate(5, 10, Settings("cosine", lr_scheduler_kwargs={"power": 2.0}))
