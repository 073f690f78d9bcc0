"""The model card of a run: what was trained, on what, how, and what came of it.

Everything in it is read from what the run left: run.json, metrics.jsonl, adapter_config.json, and
`evaluation_before.json` and `evaluation_after.json` where `halfbyte evaluate --out` wrote them.
The card is written again by a merge or a push; without its last line it is left as it is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from halfbyte.train.directory import METRICS_FILE, disk_errors, read_run, replacing

CARD_FILE = "README.md"
MARK = (
    "<!-- Written by Halfbyte. Without this line the card is yours, and is not written again. -->"
)
_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay",
    "max_grad_norm", "compute", "seed",
)  # fmt: skip
_ADAPTER = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
_MOST_POINTS = 40
_SCORES = {"loss": "held-out loss", "perplexity": "perplexity", "exact_match": "exact match"}


def write_card(
    run: Path,
    to: Path | None = None,
    *,
    merged: Sequence[str] | None = None,
    name: str | None = None,
) -> Path | None:
    """Write the card of a run.

    Args:
        run: The run's folder, or any adapter's.
        to: The folder that it describes; by default the run's.
        merged: What the merge that made `to` said of itself, a sentence each.
        name: What the card calls it; by default the run's name.

    Returns:
        The card; None where there is one that is somebody's own.
    """
    path = (to or run) / CARD_FILE
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        return None
    text = make_card(run, merged=merged, name=name)
    with disk_errors(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def make_card(run: Path, *, merged: Sequence[str] | None = None, name: str | None = None) -> str:
    """Return the card's text; arguments as in `write_card`."""
    record = read_run(run) or {}
    adapter = _read(run / "adapter_config.json")
    base = str(record.get("base_model") or adapter.get("base_model_name_or_path") or "")
    parts = [
        f"# {name or run.resolve().name}",
        _introduction(base, record, adapter, is_merged=merged is not None),
        *_section("Merge", "\n\n".join(merged or ())),
        *_section("Results", _results(run, record)),
        *_section("Training loss", _curve(_events(run, "step"))),
        *_section("Data", _data(record)),
        *_section("Settings", _settings(record, adapter)),
        *_section("Use", _usage(base, name or run.name, is_merged=merged is not None)),
        *_section("Versions", _versions(record)),
        MARK,
    ]
    data = _metadata(base, is_merged=merged is not None)
    return f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(part for part in parts if part) + "\n"


def _metadata(base: str, *, is_merged: bool) -> ModelCardData:
    """Return what the hub reads; a base that is a folder here has no name there."""
    is_named = bool(base) and not Path(base).is_dir() and not base.startswith(("/", ".", "~"))
    return ModelCardData(
        base_model=base if is_named else None,
        base_model_relation=("finetune" if is_merged else "adapter") if is_named else None,
        library_name="transformers" if is_merged else "peft",
        license=_licence(base),
        pipeline_tag="text-generation",
        tags=["halfbyte", "qlora", "lora"],
    )


def _licence(base: str) -> str | None:
    """Return the licence that the card in a base's folder names, if it names one."""
    path = Path(base) / CARD_FILE
    if not base or not path.is_file():
        return None
    try:
        licence = (metadata_load(path) or {}).get("license")
    except (ValueError, OSError, yaml.YAMLError):  # somebody's card, which need not be well-formed
        return None
    return licence if isinstance(licence, str) else None


def _introduction(
    base: str, record: Mapping[str, Any], adapter: Mapping[str, Any], *, is_merged: bool
) -> str:
    quantization = record.get("quantization") or {}
    held = quantization.get("bnb_4bit_quant_type")
    how = f"QLoRA ({held}, rank {adapter.get('r')})" if held else f"LoRA (rank {adapter.get('r')})"
    what = "A model" if is_merged else "An adapter"
    licence = _licence(base) or "see there"
    shown = Path(base).name if Path(base).is_dir() else base
    is_fp8 = (record.get("settings") or {}).get("compute") == "fp8"
    way = ", its layers multiplied in eight bits (`compute: fp8`)" if is_fp8 else ""
    return f"{what} trained with {how} on {shown or 'a base'}{way}. Licence of the base: {licence}."


def _results(run: Path, record: Mapping[str, Any]) -> str:
    evaluations = _events(run, "evaluation")
    before = {**_before(evaluations), **_read(run / "evaluation_before.json")}
    after = {
        **({"loss": evaluations[-1]["loss"]} if evaluations else {}),
        **_read(run / "evaluation_after.json"),
    }
    if "loss" in after:
        after.setdefault("perplexity", math.exp(min(after["loss"], 700)))
    rows = [
        (label, _number(before.get(key)), _number(after.get(key)))
        for key, label in _SCORES.items()
        if key in after
    ]
    result = record.get("result") or {}
    rows += [("training loss", "", _number(result["loss"]))] if "loss" in result else []
    return _table(("", "before", "after"), rows) if rows else ""


def _before(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was measured before the first step, if that was."""
    first = evaluations[0] if evaluations else {}
    if first.get("step") != 0:
        return {}
    return {"loss": first["loss"], "perplexity": math.exp(min(first["loss"], 700))}


def _curve(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return the losses as a chart that the hub and others draw; few points, evenly spaced."""
    if len(steps) < 2:
        return ""
    stride = max(1, math.ceil(len(steps) / _MOST_POINTS))
    shown = [*steps[:-1:stride], steps[-1]]
    places = ", ".join(str(each["step"]) for each in shown)
    values = ", ".join(f"{each['loss']:.4g}" for each in shown)
    return (
        "```mermaid\nxychart-beta\n"
        f'  x-axis "step" [{places}]\n  y-axis "loss"\n  line [{values}]\n```'
    )


def _data(record: Mapping[str, Any]) -> str:
    data = record.get("data") or {}
    summary = data.get("summary") or {}
    rows = []
    for split in ("train", "eval"):
        counts = summary.get(split) or {}
        if counts:
            said = ", ".join(
                f"{counts[key]:,} {label}"
                for key, label in (
                    ("rows", "rows"),
                    ("total_tokens", "tokens"),
                    ("supervised_tokens", "learned"),
                )
            )
            rows.append((split, said))
    if data.get("fingerprint"):
        rows.append(("fingerprint", f"`{data['fingerprint']}`"))
    return _table(("", ""), rows) if rows else ""


def _settings(record: Mapping[str, Any], adapter: Mapping[str, Any]) -> str:
    settings = record.get("settings") or {}
    rows = [(f"`{key}`", _plain(adapter[key])) for key in _ADAPTER if adapter.get(key)]
    rows += [(f"`{key}`", _plain(settings[key])) for key in _SETTINGS if settings.get(key)]
    return _table(("setting", "value"), rows) if rows else ""


def _usage(base: str, name: str, *, is_merged: bool) -> str:
    if is_merged:
        lines = f'model = AutoModelForCausalLM.from_pretrained("{name}")'
    else:
        shown = Path(base).name if Path(base).is_dir() else base
        lines = (
            f'model = AutoModelForCausalLM.from_pretrained("{shown or "the base"}")\n'
            f'model = PeftModel.from_pretrained(model, "{name}")'
        )
    imports = "from transformers import AutoModelForCausalLM\n"
    imports = imports if is_merged else f"from peft import PeftModel\n{imports}"
    return f"```python\n{imports}\n{lines}\n```"


def _versions(record: Mapping[str, Any]) -> str:
    found = record.get("versions") or {}
    return ", ".join(f"{package} {version}" for package, version in sorted(found.items()))


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", text] if text else []


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of one kind."""
    try:
        lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []
    return [event for event in events if isinstance(event, dict) and event.get("event") == kind]
