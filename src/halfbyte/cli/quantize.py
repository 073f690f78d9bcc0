"""halfbyte quantize: a 16-bit checkpoint becomes a 4-bit one."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    model: Annotated[str, typer.Argument(help="A folder, a name on the hub, or `demo`.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    quant_type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights that share one scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Hold the scales in 8 bits too.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it is there.")] = False,
) -> None:
    """Write MODEL as a 4-bit checkpoint that transformers, bitsandbytes and vLLM load."""
    from halfbyte.cli.display import quieten, size

    quieten()
    from halfbyte.config import resolve_model
    from halfbyte.models.quantize import quantize as quantize_model
    from halfbyte.quant.config import NF4Config

    config = NF4Config(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    quantize_model(resolve_model(model), out, config=config, overwrite=overwrite)
    total = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{out}: {size(total)} of weights")
