"""halfbyte demo: the whole way, on any laptop, without network."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output_dir: Annotated[Path, typer.Argument(help="Where the run is kept.")] = Path("runs/demo"),
) -> None:
    """Fine-tune the base that comes with Halfbyte, score it before and after, merge, talk."""
    from halfbyte.demo.run import run_demo

    run_demo(output_dir=str(output_dir))
