"""halfbyte audit: every row of the data, looked at before it is trained on."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from halfbyte.config import RunConfig
    from halfbyte.data.audit import Report
    from halfbyte.data.gather import Gathered

RUINOUS = 1
"""Exit code where training would refuse the data."""
_YAML = (".yaml", ".yml")


def audit(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_DATA", help="A run's YAML file, or data (with --model)."),
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, over those in the file.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer and chat template; over the file's.")
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Show the first N rows token by token, learned ones green.")
    ] = 0,
    html: Annotated[
        Path | None, typer.Option(help="Write the report as one HTML file, with the shown rows.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Look at every row of a run's data: what is learned, what is lost, what is wrong.

    No weights are loaded. The tokens are kept: training afterwards does not tokenize again.
    Exit code 1 says that something would ruin the model and training would refuse it.
    """
    from rich.console import Console

    from halfbyte.cli.display import quieten
    from halfbyte.data.audit import audit as audit_data

    quieten()
    config = _config(source, settings or [], model)
    report, gathered = audit_data(config.data, _tokenizer(config), seed=config.train.seed)
    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        _print(console, report, gathered, show)
    if html is not None:
        _write(html, report, gathered, show, str(source))
        if not as_json:
            console.print(f"written to {html}", markup=False)
    if report.ruins:
        raise typer.Exit(RUINOUS)


def _config(source: Path, settings: list[str], model: str | None) -> "RunConfig":
    from halfbyte.config import RunConfig
    from halfbyte.config.text import parse_override

    if source.suffix.lower() in _YAML:
        return RunConfig.from_yaml(source, [*settings, *([f"model={model}"] if model else [])])
    if model is None:
        raise ConfigError(
            f"{source} is no YAML file, so it is taken for data; whose tokenizer reads them?",
            hint="add --model with a folder or a hub name, or name a run.yaml",
        )
    changes = dict(parse_override(text) for text in settings)
    return RunConfig.from_dict({"path": str(source), **changes, "model": model})


def _tokenizer(config: "RunConfig") -> "PreTrainedTokenizerBase":
    """Return the model's tokenizer, from its folder or the hub; weights need not be there."""
    from halfbyte.models.folder import find_folder
    from halfbyte.models.tokenizer import load_tokenizer

    folder = find_folder(config.model_path, with_weights=False)
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = described.get("text_config", described)["vocab_size"]
    except (OSError, ValueError, LookupError, AttributeError):
        size = None
    return load_tokenizer(folder, size if isinstance(size, int) else sys.maxsize)


def _print(console: "Console", report: "Report", gathered: "Gathered", show: int) -> None:
    from halfbyte.data.show import shown_rows

    console.print(report)
    for name, split in gathered.splits.items():
        for row in shown_rows(gathered, split, show):
            console.print(f"\n{name}: ", end="")
            console.print(row)


def _write(path: Path, report: "Report", gathered: "Gathered", show: int, title: str) -> None:
    from halfbyte.data.show import page, shown_rows

    rows = {name: shown_rows(gathered, split, show) for name, split in gathered.splits.items()}
    try:
        path.write_text(page(report, rows, f"audit of {title}"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}", hint="name another file with --html"
        ) from error
