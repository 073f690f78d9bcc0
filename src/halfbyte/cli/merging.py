"""What merge and export share: where the base is, how it was held, and rows to measure on."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

Base = Annotated[
    str | None, typer.Option(help="The base, where it is not where training found it.")
]
Recipe = Annotated[
    str | None, typer.Option(help="nf4 or fp4, where the adapter's folder does not say.")
]
T = TypeVar("T")


def base_settings(base: str | None, quant: str | None) -> dict[str, Any]:
    """Return both options as settings of a merge."""
    from halfbyte.config import resolve_model
    from halfbyte.quant.config import NF4Config

    return {
        "base": None if base is None else resolve_model(base),
        "quant": None if quant is None else NF4Config(quant_type=quant),
    }


def rows_of(run: Path, data: str | None) -> dict[str, Any]:
    """Return the rows that were named, or the run's own and the seed that held some of them out.

    Args:
        run: A run's folder; another one has no rows of its own.
        data: A file, a folder or a hub name, read as the run read its own.
    """
    import json

    from halfbyte.cli.train import SETTINGS_FILE
    from halfbyte.config import RunConfig, read_data_settings

    path = run / SETTINGS_FILE
    if data is not None:
        return {"data": read_data_settings([f"path={json.dumps(data)}"], as_in=path)}
    if not path.is_file():
        return {}
    config = RunConfig.from_yaml(path)
    return {"data": config.data, "seed": config.train.seed}


def measured(merge: Callable[[dict[str, Any]], T], rows: dict[str, Any], data: str | None) -> T:
    """Merge with rows to measure on; the run's own ones may be gone, those that were named not."""
    from halfbyte.errors import DataError

    try:
        return merge(rows)
    except DataError as error:
        if data is not None or not rows:
            raise
        print(f"not measured, the run's own rows cannot be read: {error.message}")
        return merge({})


def print_limits(adapter: str | Path) -> None:
    """Say what servers cannot take of an adapter that is not merged."""
    from halfbyte.export.consumers import adapter_limits

    for limit in adapter_limits(adapter):
        print(f"note: unmerged, {limit}")
