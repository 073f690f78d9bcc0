"""halfbyte plan: the bytes of a run before it runs, by owner, and what fits on which card."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.config import RunConfig
    from halfbyte.plan.predict import Planner, Prediction, Setting

_YAML = (".yaml", ".yml")
# As `train/loss.py`: short micro-batches go through a fused model together, up to so many tokens.
_TOKENS_AT_ONCE = 8192


def plan(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's YAML file, or a model.")
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, over those in the file.")
    ] = None,
    vram: Annotated[str | None, typer.Option(help="Memory of the card, such as 24GiB.")] = None,
    card: Annotated[str | None, typer.Option(help="Its name, such as rtx4090.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Cards; each holds the whole model.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say how much memory a run will take, when and for what, and what would fit.

    Nothing but config.json is read, and no GPU is needed. Exit code 1 says that the run does not
    fit the card that was named (or that is here).
    """
    from halfbyte.cli.display import quieten

    quieten()
    from halfbyte.plan.changes import changes
    from halfbyte.plan.fit import table

    config = read_config(source, settings or [])
    total = card_memory(vram, card)
    planner = make_planner(config)
    prediction = planner.predict(setting_of(config, planner, total))
    fitting = table(planner, prediction.setting)
    found = [] if prediction.fits else changes(planner, prediction)
    if as_json:
        record = as_record(prediction, fitting) | {
            "gpus": gpus,
            "changes": [{"change": c.text, "peak_bytes": c.peak_bytes} for c in found],
        }
        print(json.dumps(record))
    else:
        show(prediction, title=_title(config, prediction, gpus))
        _show_table(fitting, getattr(planner.causal.config, "max_position_embeddings", None))
        for change in found:
            print(f"would fit: {change.text}  (peak {_gib(change.peak_bytes)})")
    if not prediction.fits:
        raise typer.Exit(1)


def read_config(source: str, settings: Iterable[str]) -> "RunConfig":
    """Return a run's settings from its YAML file, or from a model alone."""
    from halfbyte.config import RunConfig
    from halfbyte.config.text import parse_override

    if source.endswith(_YAML):
        return RunConfig.from_yaml(Path(source), settings)
    return RunConfig.from_dict({"model": source, **dict(map(parse_override, settings))})


def card_memory(vram: str | None, card: str | None) -> int | None:
    """Return the bytes of the card that was named, or of the one that is here, or None."""
    import torch

    from halfbyte.plan.cards import card_bytes, parse_size

    if vram is not None and card is not None:
        raise ConfigError("--vram and --card both say how much memory there is: keep one")
    if vram is not None:
        return parse_size(vram)
    if card is not None:
        return card_bytes(card)
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def make_planner(config: "RunConfig") -> "Planner":
    """Return the planner of a run, from its model's config.json."""
    import torch

    from halfbyte.models.folder import find_folder
    from halfbyte.plan.blueprint import blueprint
    from halfbyte.plan.predict import Planner

    model = blueprint(
        find_folder(config.model_path, with_weights=False),
        quant=config.quant.build() if config.quant else None,
        lora=config.lora.build(),
        dtype=getattr(torch, config.dtype) if config.dtype else None,
    )
    return Planner(model)


def setting_of(config: "RunConfig", planner: "Planner", total_bytes: int | None) -> "Setting":
    """Return the worst micro-step of a run: rows of `max_length` tokens."""
    from halfbyte.optim.names import OPTIMIZERS
    from halfbyte.plan.predict import Setting

    train, length = config.train, config.data.max_length
    rows = train.per_device_train_batch_size
    if planner.why_unfused is None:
        together = max(_TOKENS_AT_ONCE // (rows * length), 1)
        rows *= min(together, train.gradient_accumulation_steps)
    # Without a card nothing is short, and `auto` would spend it all: show the least instead.
    is_open = total_bytes is None and train.memory == "auto"
    state_bits, is_paged = OPTIMIZERS[train.optim]
    return Setting(
        rows=rows,
        length=length,
        memory="lean" if is_open else train.activations,
        compute=train.compute,
        state_bits=state_bits,
        is_paged=is_paged,
        is_checkpointed=train.gradient_checkpointing,
        total_bytes=total_bytes,
    )


def as_record(prediction: "Prediction", fitting: dict[int, int]) -> dict[str, Any]:
    """Return a prediction as plain JSON values."""
    import dataclasses

    return {
        "setting": dataclasses.asdict(prediction.setting),
        "peak_bytes": prediction.peak.nbytes,
        "moment": prediction.peak.moment,
        "owners": dict(prediction.peak.owners),
        "persistent": dict(prediction.persistent),
        "paged_bytes": prediction.paged_bytes,
        "layers_keep": dict(prediction.kept),
        "offloaded_bytes": prediction.offloaded_bytes,
        "tile_tokens": prediction.tile,
        "why_unfused": prediction.why_unfused,
        "fits": prediction.fits,
        "most_tokens_by_card_gb": fitting,
    }


def show(prediction: "Prediction", *, title: str) -> None:
    """Print the bytes by owner at the worst moment, and whether they fit."""
    from halfbyte.cli.display import print_facts
    from halfbyte.plan.cards import usable_bytes

    owners = sorted(prediction.peak.owners.items(), key=lambda item: -item[1])
    facts: dict[str, object] = {name: _gib(nbytes) for name, nbytes in owners if nbytes}
    facts["peak"] = f"{_gib(prediction.peak.nbytes)}, at {prediction.peak.moment}"
    if prediction.paged_bytes:
        facts["paged out"] = f"{_gib(prediction.paged_bytes)} of optimizer state in host memory"
    if prediction.why_unfused is not None:
        facts["layers"] = f"transformers' own: {prediction.why_unfused}"
    elif prediction.kept:
        facts["layers keep"] = _kept(prediction)
    if prediction.offloaded_bytes:
        facts["host memory"] = f"{_gib(prediction.offloaded_bytes)} for inputs of layers"
    if prediction.tile:
        facts["MLPs"] = f"over {prediction.tile:,} tokens at a time"
    total = prediction.setting.total_bytes
    if total is not None:
        verdict = "fits" if prediction.fits else "DOES NOT FIT"
        facts["card"] = (
            f"{_gib(total)}, of which tensors can have {_gib(usable_bytes(total))}: {verdict}"
        )
    print_facts(title, facts)


def before_training(config: "RunConfig") -> None:
    """Print the plan of a run that is about to load its model on a GPU."""
    from halfbyte.device import resolve_device
    from halfbyte.plan.changes import changes

    if resolve_device(config.device).type != "cuda":
        return
    planner = make_planner(config)
    prediction = planner.predict(setting_of(config, planner, card_memory(None, None)))
    show(prediction, title=f"plan of {_title(config, prediction, 1)}")
    if not prediction.fits:
        print("note: micro-batches will be cut until a step fits; it would fit whole with")
        for change in changes(planner, prediction):
            print(f"  {change.text}  (peak {_gib(change.peak_bytes)})")


def _title(config: "RunConfig", prediction: "Prediction", gpus: int) -> str:
    setting = prediction.setting
    each = f" on each of {gpus} cards" if gpus > 1 else ""
    compute = "" if setting.compute == "bf16" else f", compute {setting.compute}"
    return (
        f"{config.model}, a micro-step of {setting.rows} x {setting.length:,} tokens, "
        f"memory {setting.memory}{compute}{each}"
    )


def _kept(prediction: "Prediction") -> str:
    words = {
        "offload": "nothing, their input is in host memory",
        "input": "their input",
        "attention": "attention and its inputs",
        "all": "everything",
        "weights": "dequantized weights too",
    }
    kept = prediction.kept.items()
    return ", ".join(f"{words.get(name, name)} ({count})" for name, count in kept)


def _show_table(fitting: dict[int, int], limit: int | None) -> None:
    """Print the most tokens of a micro-step for each card."""
    print("\nmost tokens in one micro-step (one sequence, or rows together), by card")
    for size, tokens in fitting.items():
        note = f"  (the model was made for {limit:,})" if limit and tokens > limit else ""
        print(f"  {size:>4} GB  {f'{tokens:,}' if tokens else '-':>9}{note}")


def _gib(nbytes: int) -> str:
    from halfbyte.plan.explain import gib

    return gib(nbytes)
