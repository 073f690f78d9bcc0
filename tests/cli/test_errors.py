"""Errors are two lines on stderr and exit code 2; a traceback is for those who ask."""

import pytest
import typer
from typer.testing import CliRunner

from halfbyte.cli.errors import ErrorGroup
from halfbyte.errors import DataError, HalfbyteError


class Stopped(HalfbyteError):
    exit_code = 143


@pytest.fixture
def call():
    """Return a function that runs a verb which raises an error, and the result."""

    def run(error, *arguments):
        app = typer.Typer(cls=ErrorGroup, pretty_exceptions_enable=False)

        @app.callback()
        def options(debug: bool = False) -> None:
            pass

        @app.command()
        def verb() -> None:
            raise error

        return CliRunner().invoke(app, [*arguments, "verb"])

    return run


def test_message_and_hint_are_two_lines(call):
    result = call(DataError("expected rows, got none", hint="give some"))
    assert result.exit_code == 2
    assert result.stderr == "error: expected rows, got none\nhint: give some\n"
    assert result.stdout == ""


def test_without_a_hint_there_is_one_line(call):
    assert call(DataError("no rows")).stderr == "error: no rows\n"


def test_debug_shows_the_traceback(call):
    result = call(DataError("no rows"), "--debug")
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: no rows\n")


def test_a_stopped_run_exits_with_its_signal(call):
    result = call(Stopped("stopped by SIGTERM"))
    assert (result.exit_code, result.stderr) == (143, "stopped by SIGTERM\n")


def test_ctrl_c_exits_with_130(call):
    result = call(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "stopped\n")


def test_mistakes_of_our_own_keep_their_traceback(call):
    result = call(ZeroDivisionError("oh"))
    assert isinstance(result.exception, ZeroDivisionError)
