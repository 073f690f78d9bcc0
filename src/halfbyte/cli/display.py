"""What the verbs print with: tables for people, plain lines for pipes."""

import logging
import sys
import warnings
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Print a title, then names and values, one a line."""
    if title:
        print(title)
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"  {name:<{width}}  {value}")


def quieten() -> None:
    """Keep libraries from writing between the lines that the verbs write.

    Their warnings about each other's future are for programmers, and progress bars for terminals.
    """
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module="peft")
    # bitsandbytes, which peft imports where it is installed, misses kernels that nobody calls here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def progress_bar() -> Progress:
    """Return a bar on stderr that is only there in a terminal, and gone when done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )


def size(num_bytes: float) -> str:
    """Return a number of bytes as people read it: 3.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def count(number: float) -> str:
    """Return a number of parameters as people read it: 8.03 B."""
    for unit in ("", " K", " M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.2f} B"
