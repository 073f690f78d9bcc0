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


TOKEN = "hf_" + "A1b2C3d4E5" * 3 + "wxyz"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("no file https://ada:pa55@host/x", "no file https://***@host/x"),
        ("no file https://host/x?token=pa55 here", "no file https://host/x?token=*** here"),
        (f"{TOKEN!r} is no folder", "'***' is no folder"),
        ("git@host:x, s3://bucket/x, hf_model, sk-learn", None),
    ],
)
def test_messages_hold_no_secrets(message, shown):
    error = errors.DataError(message)
    assert error.message == (shown or message)
    assert str(error) == error.message
    assert error.args == (error.message,)
