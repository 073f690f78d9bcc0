"""halfbyte merge: adapter and base become one plain checkpoint."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[str, typer.Argument(help="A run's folder, or an adapter's.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    onto: Annotated[
        str,
        typer.Option(help="dequantized: the base as training saw it; original: in 16 bits."),
    ] = "dequantized",
    base: Annotated[
        str | None, typer.Option(help="The base, where it is not where training found it.")
    ] = None,
    quant: Annotated[
        str | None, typer.Option(help="nf4 or fp4, where the adapter's folder does not say.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default the base's.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write ADAPTER and its base as a plain transformers checkpoint, with its tokenizer."""
    from halfbyte.cli.display import print_facts, quieten, size

    quieten()
    from halfbyte.config import resolve_model
    from halfbyte.export.merge import merge as merge_adapter
    from halfbyte.quant.config import NF4Config

    result = merge_adapter(
        adapter,
        out,
        onto=onto,  # type: ignore[arg-type]  # merge checks the value
        base=None if base is None else resolve_model(base),
        dtype=dtype,
        quant=None if quant is None else NF4Config(quant_type=quant),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    facts = {
        "merged onto": f"{result.base} ({result.onto})",
        "tensors changed": f"{result.tensors_merged} of {result.tensors}",
        "update lost to rounding": f"{result.rounding_loss:.1%} (mean over the changed weights)",
        "weights": size(sum(path.stat().st_size for path in out.glob("*.safetensors"))),
        "written to": out,
    }
    print_facts("", facts)
