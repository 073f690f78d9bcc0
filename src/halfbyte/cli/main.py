"""The command `halfbyte`: one verb each for what can be done with a model.

Verbs import what they need when they run, so that `halfbyte --help` is quick.
"""

from typing import Annotated

import typer

import halfbyte
from halfbyte.cli.audit import audit
from halfbyte.cli.chat import chat
from halfbyte.cli.demo import demo
from halfbyte.cli.doctor import doctor
from halfbyte.cli.errors import ErrorGroup, flush_stdout
from halfbyte.cli.evaluate import evaluate
from halfbyte.cli.export import export
from halfbyte.cli.generate import generate
from halfbyte.cli.merge import merge
from halfbyte.cli.plan import plan
from halfbyte.cli.push import push
from halfbyte.cli.quantize import quantize
from halfbyte.cli.serve import serve
from halfbyte.cli.train import TrainCommand, train
from halfbyte.cli.verify_resume import verify_resume
from halfbyte.cli.version import version

app = typer.Typer(
    name="halfbyte",
    help=halfbyte.__doc__,
    cls=ErrorGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of errors too.")
    ] = False,
) -> None:
    """Hold the options that stand before the verb."""


VERBS = (
    doctor,
    demo,
    audit,
    plan,
    quantize,
    train,
    verify_resume,
    evaluate,
    generate,
    chat,
    merge,
    export,
    push,
    serve,
    version,
)
for verb in VERBS:
    app.command(cls=TrainCommand if verb is train else None)(verb)


def main() -> None:
    """Run the command line; whoever read its output may be gone at the end."""
    try:
        app()
    finally:
        flush_stdout()
