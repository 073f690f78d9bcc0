"""What can go wrong, as one tree of exceptions.

    HalfbyteError
    ├── ConfigError         a setting is missing, unknown or contradicts another (also a ValueError)
    ├── DataError           the training data cannot be read or would not train anything
    ├── CheckpointError     a file on disk is missing, damaged or of another kind
    ├── QuantizationError   a weight cannot be held in four bits
    ├── AdapterError        an adapter does not fit the model
    ├── DeviceError         the machine lacks what was asked for, or ran out of it
    └── TrainingError       a run cannot go on: its loss or gradient is no longer finite

Each message says what was expected, what came, and (as `hint`) what to do.
The command line prints both lines and exits with code 2; a traceback is only for our own mistakes.
No message holds a password or an access token.
"""

import re

_SECRET = re.compile(
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # https://name:password@host
    r"|(?<=[?&]token=)[^&\s'\"]+"
    r"|\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{32,}|gh[pos]_[A-Za-z0-9]{36,})"
)


def without_secrets(text: str) -> str:
    """Return `text` with `***` for passwords in URLs and for access tokens of known forms."""
    return _SECRET.sub("***", text)


class HalfbyteError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        message: What was expected and what came, with the values.
        hint: What to do about it, in one sentence.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = without_secrets(message)
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(HalfbyteError, ValueError):
    """A setting is missing, unknown or contradicts another."""


class DataError(HalfbyteError):
    """The training data cannot be read, or would not train anything."""


class CheckpointError(HalfbyteError):
    """A file on disk is missing, damaged or of another kind."""


class QuantizationError(HalfbyteError):
    """A weight cannot be held in four bits."""


class AdapterError(HalfbyteError):
    """An adapter does not fit the model."""


class DeviceError(HalfbyteError):
    """The machine lacks what was asked for, or ran out of it."""


class TrainingError(HalfbyteError):
    """A run cannot go on: its loss or gradient is no longer finite."""
