"""halfbyte evaluate: loss, perplexity and right answers on held-out rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.opening import Adapter, Device, Model, Quant
from halfbyte.cli.train import SETTINGS_FILE

if TYPE_CHECKING:
    from halfbyte.data.config import DataConfig


def evaluate(
    model: Model,
    data: Annotated[str, typer.Argument(help="A file, folder or hub name.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="key=value: how to read it (columns, format, split, chat_template...)"),
    ] = None,
    adapter: Adapter = None,
    quant: Quant = "auto",
    exact_match: Annotated[
        str | None,
        typer.Option(help="Score generated answers: exact, or number (the one after ####)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Generate only so many answers.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; by default a little over the references'.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in one forward pass.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write all results as JSON.")] = None,
    device: Device = None,
) -> None:
    """Measure MODEL on DATA, with or without an adapter.

    The rows are read as in the adapter's training, where key=value does not say otherwise.
    """
    from halfbyte.cli.display import print_facts, quieten

    quieten()
    from halfbyte.cli.opening import open_model
    from halfbyte.config import read_data_settings
    from halfbyte.train.evaluate import evaluate as evaluate_model

    overrides = [f"path={json.dumps(data)}", *(settings or [])]
    config = read_data_settings(overrides, as_in=Path(adapter or model) / SETTINGS_FILE)
    loaded, tokenizer = open_model(model, adapter, quant, device)
    result = evaluate_model(loaded, tokenizer, config, batch_size=batch_size)
    facts: dict[str, Any] = {"loss": f"{result.loss:.4f}", "perplexity": f"{result.perplexity:.3f}"}
    facts["supervised tokens"] = f"{result.tokens:,}"
    results = asdict(result)
    if exact_match is not None:
        score = _score(loaded, tokenizer, config, exact_match, limit, max_new_tokens)
        facts["exact match"] = f"{score.exact_match:.1%} of {score.total}"
        results |= asdict(score)
    print_facts("", facts)
    if out is not None:
        out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _score(
    model: Any,
    tokenizer: Any,
    config: "DataConfig",
    extract: str,
    limit: int | None,
    max_new_tokens: int | None,
) -> Any:
    """Answer the rows and compare, with a bar in a terminal."""
    from halfbyte.cli.display import progress_bar
    from halfbyte.errors import ConfigError
    from halfbyte.generate.score import exact_match

    if extract not in ("exact", "number"):
        raise ConfigError(f"--exact-match should be exact or number, got {extract!r}")
    rows = conversations(config, tokenizer)[:limit]
    with progress_bar() as progress:
        task = progress.add_task("answering", total=len(rows))
        return exact_match(
            model,
            tokenizer,
            rows,
            extract=extract,  # type: ignore[arg-type]
            max_new_tokens=max_new_tokens,
            on_done=lambda count: progress.advance(task, count),
        )


def conversations(config: "DataConfig", tokenizer: Any) -> list[dict[str, Any]]:
    """Return the rows as messages, and give the tokenizer the template that they are read with."""
    from halfbyte.data.formats import detect
    from halfbyte.data.sources import decode, load_source
    from halfbyte.data.templates import resolve_template

    source = load_source(
        str(config.path), name=config.name, split=config.split, cache_dir=config.cache_dir
    )
    layout = detect(config.format, config.columns, source.first(), config.system_prompt)
    template = resolve_template(config.chat_template, tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    rows = decode(source.rows[:], range(len(source)))
    return [{"messages": layout.read(row, where).messages} for where, row in rows]
