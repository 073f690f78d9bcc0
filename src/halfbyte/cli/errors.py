"""How errors look on the command line: two lines on stderr and exit code 2.

`error:` says what was expected and what came, `hint:` what to do. Ctrl-C exits with 130, a run that
a signal stopped with 128 plus the signal's number. `halfbyte --debug <verb>` shows the traceback
too; mistakes of our own always show it.
"""

import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from halfbyte.errors import HalfbyteError

USAGE_ERROR = 2
INTERRUPTED = 130


def report(error: HalfbyteError) -> None:
    """Print an error and its hint on stderr; a run that was told to stop made no error."""
    prefix = "" if hasattr(error, "exit_code") else "error: "
    print(f"{prefix}{error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def flush_stdout() -> None:
    """Write what is still to be written; a reader that is gone is no error."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ErrorGroup(TyperGroup):
    """A group of commands whose user errors become messages."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; turn a `HalfbyteError` into two lines and an exit code."""
        try:
            return super().invoke(ctx)
        except HalfbyteError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            report(error)
            raise typer.Exit(getattr(error, "exit_code", USAGE_ERROR)) from error
        except KeyboardInterrupt as error:
            print("stopped", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error
