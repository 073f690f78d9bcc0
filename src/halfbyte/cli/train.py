"""halfbyte train: one YAML file, one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from halfbyte.config import RunConfig
    from halfbyte.train.events import Listener, TrainResult

SETTINGS_FILE = "run.yaml"
"""Every setting of a run, in its output directory; `halfbyte train` reads it as it is."""


class TrainCommand(TyperCommand):
    """`--resume` may stand alone, and --help lists every setting."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a bare `--resume` as `--resume auto`."""
        args = list(args)
        for index in [i for i, arg in enumerate(args) if arg == "--resume"]:
            following = args[index + 1 : index + 2]
            if not following or "=" in following[0] or following[0].startswith("-"):
                args[index] = "--resume=auto"
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usual help, then the settings."""
        super().format_help(ctx, formatter)
        print_settings()


def print_settings() -> None:
    """List every setting with its default and what it means."""
    from rich.console import Console
    from rich.markup import escape

    from halfbyte.config import describe_settings

    console = Console(highlight=False)
    for section, settings in describe_settings().items():
        console.print(f"\n[bold]{section}[/]")
        for name, default, meaning in settings:
            console.print(f"  [cyan]{name}[/] [dim]{escape(default)}[/]  {escape(meaning)}")


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; examples/ has some.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, over those in the file.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[auto|PATH]", help="Go on from the newest checkpoint, or from PATH."),
    ] = None,
) -> None:
    """Train an adapter as a YAML file says; key=value settings win over it.

    Relative paths are relative to the current directory.
    """
    from halfbyte.cli.display import quieten

    quieten()
    from halfbyte.config import RunConfig

    overrides = list(settings or [])
    if resume is not None:
        overrides.append(f"resume_from_checkpoint={resume}")
    run(RunConfig.from_yaml(config, overrides))


def run(config: "RunConfig", *, listeners: Sequence["Listener"] = ()) -> None:
    """Check the data, load the model, train, and say what came out."""
    from halfbyte.adapters.inject import add_lora
    from halfbyte.cli.display import print_facts, size
    from halfbyte.cli.plan import before_training
    from halfbyte.device import join_memory
    from halfbyte.export.consumers import adapter_limits
    from halfbyte.models.load import load
    from halfbyte.train.determinism import determinism
    from halfbyte.train.loop import train as train_model

    join_memory()
    check(config)
    before_training(config)
    with determinism(enabled=config.train.deterministic):  # before the first product on a GPU
        model, tokenizer = load(
            config.model_path,
            quant=config.quant.build() if config.quant else None,
            device=config.device,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
        )
        adapted = add_lora(model, config.lora.build(), seed=config.train.seed)
        print_facts("model", _model_facts(config, adapted))
        listeners = [_record(config), *listeners]
        result = train_model(adapted, tokenizer, config.data, config.train, listeners=listeners)
    output_dir = Path(config.train.output_dir)
    facts = {
        "steps": f"{result.steps:,} in {result.seconds:,.0f} s",
        "training loss": f"{result.loss:.4f}",
        "held-out loss": "-" if result.eval_loss is None else f"{result.eval_loss:.4f}",
        "tokens/s": f"{result.tokens_per_second:,.0f}",
        "peak memory": size(result.peak_bytes) + _owners(result.peak_by_owner),
        "beside it": _beside(result),
        "adapter": output_dir,
        "next": f"halfbyte chat {output_dir}  or  halfbyte merge {output_dir} {output_dir}-merged",
    }
    print_facts("result", facts)
    for limit in adapter_limits(output_dir):
        print(f"note: {limit}")


def check(config: "RunConfig") -> None:
    """Find what is wrong with folder, base, adapter or data before the model takes time and memory.

    The data's tokens are kept for the training itself.

    Raises:
        HalfbyteError: says what is wrong.
    """
    from halfbyte.adapters.checks import check_settings, check_targets
    from halfbyte.data.prepare import prepare
    from halfbyte.models.folder import find_folder
    from halfbyte.models.skeleton import read_skeleton
    from halfbyte.models.tokenizer import load_tokenizer
    from halfbyte.train.directory import refuse_taken
    from halfbyte.train.display import QuietingConsole

    _check_compute(config)
    refuse_taken(
        Path(config.train.output_dir),
        overwrite=config.train.overwrite_output_dir,
        resume=config.train.resume_from_checkpoint is not None,
    )
    folder = find_folder(config.model_path)
    model = read_skeleton(folder).model
    lora = config.lora.build()
    check_settings(lora)
    check_targets(model, lora)
    tokenizer = load_tokenizer(folder, model.get_input_embeddings().num_embeddings)
    QuietingConsole().print(prepare(config.data, tokenizer, seed=config.train.seed).summary)


def _check_compute(config: "RunConfig") -> None:
    """Refuse eight bits where no GPU multiplies them; what of the model is wrong, its plan says."""
    from halfbyte.device import resolve_device
    from halfbyte.engine.projections_fp8 import require_fp8

    if config.train.compute == "fp8":
        require_fp8(resolve_device(config.device))


def _owners(owners: Mapping[str, int]) -> str:
    from halfbyte.plan.explain import by_owner

    return f" ({by_owner(owners)})" if owners else ""


def _beside(result: "TrainResult") -> str:
    """Say what else was taken: by the allocator, of the optimizer on the host, of main memory."""
    from halfbyte.cli.display import size

    sizes = {
        "reserved": result.reserved_bytes,
        "optimizer state in host memory": result.paged_bytes,
        "host": result.host_bytes,
    }
    return ", ".join(f"{name} {size(nbytes)}" for name, nbytes in sizes.items() if nbytes)


def _record(config: "RunConfig") -> "Listener":
    """Return a listener that writes every setting beside the run when it starts."""
    from halfbyte.train.events import TrainingStarted

    def listen(event: Any) -> None:
        if isinstance(event, TrainingStarted):
            path = event.output_dir / SETTINGS_FILE
            path.write_text(config.to_yaml(), encoding="utf-8")

    return listen


def _model_facts(config: "RunConfig", model: Any) -> dict[str, str]:
    from halfbyte.adapters.inject import count_parameters
    from halfbyte.cli.display import count, size

    trainable, total = count_parameters(model)
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    held = f"{config.quant.quant_type}, 4 bits" if config.quant else "16 bits"
    return {
        "base": f"{config.model} ({held})",
        "parameters": f"{count(total)}; {count(trainable)} trainable ({trainable / total:.2%})",
        "memory": f"{size(sum(tensors.values()))} on {model.device}",
    }
