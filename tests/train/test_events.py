"""Events are values: they compare, and cannot be changed by a listener."""

import dataclasses
import typing

import pytest

from halfbyte.train.events import Event, StepFinished


def test_events_are_frozen_values():
    for event in typing.get_args(Event):
        assert dataclasses.is_dataclass(event)
        assert event.__dataclass_params__.frozen
        assert event.__doc__


@pytest.mark.parametrize(("seconds", "rate"), [(2.0, 50.0), (0.0, 0.0)])
def test_rate_is_tokens_over_seconds(seconds, rate):
    event = StepFinished(1, 2, 0.5, 1.0, 1.0, 1e-4, 80, 100, seconds, 0)
    assert event.tokens_per_second == rate
