"""halfbyte merge: adapter and base become one plain checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from halfbyte.export.merge import MergeResult


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
    base: Annotated[
        str | None, typer.Option(help="The base, where it is not where training found it.")
    ] = None,
    quant: Annotated[
        str | None, typer.Option(help="nf4 or fp4, where the adapter's folder does not say.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default the base's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu; by default the GPU.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write ADAPTER and its base as a plain transformers checkpoint, with its tokenizer.

    What was chosen, why, and what was measured also stands in OUT/merge_report.json. A merge that
    was interrupted goes on where it was when the same command is given again.
    """
    from halfbyte.cli.display import print_facts, quieten, size

    quieten()
    from halfbyte.config import resolve_model
    from halfbyte.export.consumers import adapter_limits
    from halfbyte.quant.config import NF4Config

    settings = {
        "onto": onto,
        "base": None if base is None else resolve_model(base),
        "dtype": dtype,
        "quant": None if quant is None else NF4Config(quant_type=quant),
        "device": device,
        "max_shard_size": max_shard_size,
        "overwrite": overwrite,
    }
    result = _merge(adapter, out, data, settings)
    print("\n".join(result.words()))
    facts = {
        "tensors changed": f"{result.tensors_merged} of {result.tensors}",
        "weights": size(sum(path.stat().st_size for path in out.glob("*.safetensors"))),
        "written to": out,
    }
    print_facts("", facts)
    for limit in adapter_limits(adapter):
        print(f"note: unmerged, {limit}")


def _merge(adapter: str, out: Path, data: str | None, settings: dict[str, Any]) -> "MergeResult":
    """Merge, measured where there are rows; the run's own ones may be gone."""
    from halfbyte.errors import DataError
    from halfbyte.export.merge import merge as merge_adapter

    rows = _rows(Path(adapter), data)
    try:
        return merge_adapter(adapter, out, **rows, **settings)
    except DataError as error:
        if data is not None:
            raise
        print(f"not measured, the run's own rows cannot be read: {error.message}")
        return merge_adapter(adapter, out, **settings)


def _rows(run: Path, data: str | None) -> dict[str, Any]:
    """Return which rows to measure on, and the seed that chose the run's held-out ones."""
    import json

    from halfbyte.cli.train import SETTINGS_FILE
    from halfbyte.config import RunConfig, read_data_settings

    path = run / SETTINGS_FILE
    if data == "none":
        return {}
    if data is not None:
        return {"data": read_data_settings([f"path={json.dumps(data)}"], as_in=path)}
    if not path.is_file():
        return {}
    config = RunConfig.from_yaml(path)
    return {"data": config.data, "seed": config.train.seed}
