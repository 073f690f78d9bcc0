"""What a run leaves at the root of its output directory: adapter, tokenizer, and what was run."""

import copy
import importlib.metadata
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from halfbyte.adapters.io import write_adapter
from halfbyte.train.card import write_card
from halfbyte.train.config import TrainConfig
from halfbyte.train.directory import RUN_FILE, disk_errors, read_run, replacing, write_json
from halfbyte.train.events import TrainResult
from halfbyte.train.inputs import Inputs

GENERATION_FILE = "generation_config.json"
_PACKAGES = ("halfbyte", "torch", "transformers", "peft", "safetensors")


def describe_run(
    model: PeftModel, inputs: Inputs, config: TrainConfig, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what run.json says: base model, quantization, data, settings, versions."""
    base: Any = model.get_base_model().config
    quantization = getattr(base, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return {
        "status": "running",
        "base_model": base._name_or_path,
        "quantization": quantization,
        "data": {
            "fingerprint": inputs.fingerprint,
            "summary": inputs.summary and inputs.summary.as_dict(),
        },
        "settings": config.model_dump(),
        "identity": dict(identity),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what a run's bits depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return found | {"python": platform.python_version()}


def write_result(
    model: PeftModel,
    tokenizer: Any,
    inputs: Inputs,
    description: Mapping[str, Any],
    result: TrainResult,
) -> None:
    """Write adapter and tokenizer, each file whole, and last run.json, which says so."""
    with disk_errors(result.output_dir):
        write_adapter(model, result.output_dir, adapter=model.active_adapter)
        write_tokenizer(tokenizer, result.output_dir, chat_template=inputs.chat_template)
    write_generation_config(model, inputs.stop_token_ids, result.output_dir)
    record = {**description, "status": "finished", "result": asdict(result)}
    record["result"]["output_dir"] = "."  # the directory may be moved
    write_json(result.output_dir / RUN_FILE, record)
    write_card(result.output_dir)


def write_generation_config(model: PeftModel, stops: Sequence[int], output_dir: Path) -> None:
    """Write the base's settings of generation, with the tokens that end a turn among its stops.

    Whoever loads or merges the adapter then stops where training taught it to.
    """
    config = getattr(model.get_base_model(), "generation_config", None)
    if config is None or not stops:
        return
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    known = [index for index in own if index is not None]
    settings = config.to_diff_dict() | {"eos_token_id": list(dict.fromkeys([*stops, *known]))}
    write_json(output_dir / GENERATION_FILE, settings)


def write_tokenizer(tokenizer: Any, output_dir: Path, *, chat_template: str | None) -> None:
    """Write the tokenizer's files beside the adapter, with the template that it was trained on."""
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    partial = output_dir / ".tokenizer.0.partial"
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    for source in sorted(path for path in partial.rglob("*") if path.is_file()):
        target = output_dir / source.relative_to(partial)
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as temporary:
            source.rename(temporary)
    shutil.rmtree(partial)


def finished_result(output_dir: Path, identity: Mapping[str, Any]) -> TrainResult | None:
    """Return the result, if exactly this run already finished here."""
    run = read_run(output_dir)
    if run is None or run.get("status") != "finished" or run.get("identity") != identity:
        return None
    return TrainResult(**{**run["result"], "output_dir": output_dir})
