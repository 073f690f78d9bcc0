"""halfbyte merge: adapter and base become one plain checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.merging import Base, Recipe
from halfbyte.cli.opening import Device


def merge(
    adapter: Annotated[str, typer.Argument(help="A run's folder, or an adapter's.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    onto: Annotated[
        str,
        typer.Option(
            help="dequantized: the base as training saw it; original: in 16 bits; quantized: "
            "original, and the sum in 4 bits again; auto: of the first two what measures nearer "
            "to what was trained."
        ),
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows to measure on, read as the run read its own; by default the run's held-out "
            "rows, or its training rows where it has none; `none` measures nothing."
        ),
    ] = None,
    base: Base = None,
    quant: Recipe = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default the base's.")
    ] = None,
    device: Device = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write ADAPTER and its base as a plain transformers checkpoint, with its tokenizer.

    What was chosen, why, and what was measured also stands in OUT/merge_report.json. A merge that
    was interrupted goes on where it was when the same command is given again.
    """
    from halfbyte.cli.display import print_facts, quieten, size

    quieten()
    from halfbyte.cli.merging import base_settings, measured, print_limits, rows_of
    from halfbyte.export.merge import merge as merge_adapter

    settings: dict[str, Any] = {
        **base_settings(base, quant),
        "onto": onto,
        "dtype": dtype,
        "device": device,
        "max_shard_size": max_shard_size,
        "overwrite": overwrite,
    }
    rows = {} if data == "none" else rows_of(Path(adapter), data)
    result = measured(lambda rows: merge_adapter(adapter, out, **rows, **settings), rows, data)
    print("\n".join(result.words()))
    facts = {
        "tensors changed": f"{result.tensors_merged} of {result.tensors}",
        "weights": size(sum(path.stat().st_size for path in out.glob("*.safetensors"))),
        "written to": out,
    }
    print_facts("", facts)
    print_limits(adapter)
