"""One tree of errors, each with a message and what to do about it."""

import inspect

import pytest

from halfbyte import errors

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if kind is not errors.HalfbyteError
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_a_halfbyte_error_and_in_the_picture(kind):
    assert issubclass(kind, errors.HalfbyteError)
    assert kind.__name__ in errors.__doc__


def test_message_and_hint_are_apart_and_together():
    error = errors.DataError("expected rows, got none", hint="give some")
    assert (error.message, error.hint) == ("expected rows, got none", "give some")
    assert str(error) == "expected rows, got none\nhint: give some"
    assert str(errors.DataError("no rows")) == "no rows"


def test_a_wrong_setting_is_a_value_error_too():
    assert issubclass(errors.ConfigError, ValueError)
