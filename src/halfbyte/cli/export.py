"""halfbyte export: a GGUF file for llama.cpp and Ollama."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.merging import Base, Recipe

if TYPE_CHECKING:
    from halfbyte.data.config import DataConfig
    from halfbyte.gguf.write import GgufResult

_MOST_CONVERSATIONS = 200  # of the data, whose prompts are compared


def export(
    model: Annotated[
        str, typer.Argument(help="A run's folder (merged on the way), a model's, or `demo`.")
    ],
    out: Annotated[Path, typer.Argument(help="The .gguf file to write.")],
    type: Annotated[str, typer.Option(help="f32, f16, bf16, q8_0, q4_0 or q4_k_m.")] = "f16",
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="The adapter alone (f32, f16 or bf16).")
    ] = False,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="The base alone, as the run's training saw it.")
    ] = False,
    onto: Annotated[
        str,
        typer.Option(
            help="What the adapter is added to: dequantized, the base as training saw it; "
            "original, in 16 bits; auto: of both what measures nearer to what was trained."
        ),
    ] = "dequantized",
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows whose prompts must come out as in training, and on which `--onto auto` "
            "measures; by default the run's own."
        ),
    ] = None,
    base: Base = None,
    quant: Recipe = None,
    modelfile: Annotated[bool, typer.Option(help="Write a Modelfile for Ollama beside it.")] = True,
    allow_differences: Annotated[
        bool,
        typer.Option(
            "--allow-differences", help="Write it although its prompts differ from training's."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write MODEL as a GGUF file with its tokenizer and chat template, and check its prompts.

    The prompts that a server makes of the file must be training's, token for token; else the
    differences are shown and nothing is written.
    """
    from halfbyte.cli.display import print_facts, quieten, size

    quieten()
    from halfbyte.adapters.files import CONFIG_FILE
    from halfbyte.cli.merging import base_settings, measured, print_limits, rows_of
    from halfbyte.config import resolve_model
    from halfbyte.errors import ConfigError
    from halfbyte.export.config import MergeConfig

    _require_library()
    from halfbyte.gguf.adapter import export_adapter
    from halfbyte.gguf.write import export_gguf

    if adapter_only and base_only:
        raise ConfigError("--adapter-only and --base-only exclude each other")
    folder = resolve_model(model)
    is_merged = (Path(folder) / CONFIG_FILE).is_file() and not (adapter_only or base_only)
    merge = MergeConfig(onto=onto, **base_settings(base, quant))  # type: ignore[arg-type]
    if adapter_only:
        result = export_adapter(folder, out, type, merge=merge, overwrite=overwrite)
    else:
        rows = rows_of(Path(folder), data)
        conversations = _conversations(rows.get("data"), is_named=data is not None)
        result = measured(
            lambda rows: export_gguf(
                folder,
                out,
                type,
                merge=replace(merge, **rows),
                base_only=base_only,
                conversations=conversations,
                allow_differences=allow_differences,
                overwrite=overwrite,
            ),
            rows if is_merged and onto == "auto" else {},
            data,
        )
    facts = {
        "architecture": result.architecture,
        "tensors": ", ".join(f"{number} {kind}" for kind, number in result.tensors.items()),
        "prompts": _said_of_prompts(result),
        "written to": f"{out} ({size(result.num_bytes)})",
    }
    if modelfile:
        facts["Ollama"] = _write_modelfile(folder, out, merge, adapter_only=adapter_only)
    print_facts("", {name: fact for name, fact in facts.items() if fact})
    for notice in result.notices:
        print(f"note: {notice}")
    if is_merged:
        print_limits(folder)


def _require_library() -> None:
    import importlib.util

    from halfbyte.errors import ConfigError

    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "GGUF files need the gguf library, which is not installed",
            hint="pip install 'halfbyte[gguf]'",
        )


def _conversations(config: "DataConfig | None", *, is_named: bool) -> list[Any]:
    """Return the first rows of the data; a run's own, which nobody named, may be gone."""
    from halfbyte.data.formats import detect
    from halfbyte.data.sources import decode, load_source
    from halfbyte.errors import DataError

    if config is None:
        return []
    try:
        source = load_source(
            str(config.path), name=config.name, split=config.split, cache_dir=config.cache_dir
        )
    except DataError as error:
        if is_named:
            raise
        print(f"note: the run's own rows cannot be read: {error.message}")
        return []
    layout = detect(config.format, config.columns, source.first(), config.system_prompt)
    chosen = range(min(len(source), _MOST_CONVERSATIONS))
    rows = decode(source.rows[: len(chosen)], chosen)
    return [layout.read(row, where) for where, row in rows]


def _said_of_prompts(result: "GgufResult") -> str:
    """Say what was compared."""
    parity = result.parity
    if parity is None:
        return ""
    of = "made-up ones" if parity.is_sample else "the data's"
    said = f"{parity.prompts - len(parity.differences)} of {parity.prompts} ({of}) as in training"
    for reason, number in parity.skipped.items():
        said += f"; {number} not compared: {reason}"
    return said


def _write_modelfile(folder: str | Path, out: Path, merge: Any, *, adapter_only: bool) -> str:
    """Write a Modelfile beside the GGUF file, and say where, or why there is none."""
    from halfbyte.errors import ConfigError
    from halfbyte.gguf.modelfile import modelfile_for

    path = out.with_name(f"{out.stem}.Modelfile")
    try:
        text = modelfile_for(folder, out.name, merge, adapter_only=adapter_only)
    except ConfigError as error:
        return f"no Modelfile: {error.message} ({error.hint})" if error.hint else error.message
    path.write_text(text, encoding="utf-8")
    return f"ollama create NAME -f {path}"
