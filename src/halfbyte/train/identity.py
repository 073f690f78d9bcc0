"""What a run is made of, so that resuming it with something else is noticed.

A resumed run continues bit for bit only with the same base model, adapters, data and settings.
Their identity is a JSON value, saved with every checkpoint and compared on resume.
"""

import json
from collections.abc import Mapping
from typing import Any

from peft import PeftModel

from halfbyte.adapters.identity import base_fingerprint, is_same_base
from halfbyte.data.loader import BatchPlan
from halfbyte.errors import ConfigError
from halfbyte.train.config import TrainConfig
from halfbyte.train.inputs import Inputs

# What changes only what is reported or kept, not what is learned; steps are compared as a total.
_FREE_SETTINGS = {
    "output_dir",
    "overwrite_output_dir",
    "num_train_epochs",
    "max_skipped_steps",
    "max_steps",
    "per_device_eval_batch_size",
    "memory",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "logging_strategy",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "resume_with_changes",
    "report_to",
    "run_name",
    "disable_tqdm",
}
_FREE_ADAPTER_FIELDS = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}


def identify(
    model: PeftModel, inputs: Inputs, plan: BatchPlan, config: TrainConfig, total_steps: int
) -> dict[str, Any]:
    """Return the identity of a run as plain JSON values.

    `data.order` stands for shuffling and packing: a version that orders rows otherwise is another.
    """
    adapter = model.peft_config[model.active_adapter].to_dict()
    identity = {
        "base": base_fingerprint(model),
        "adapter": {k: v for k, v in adapter.items() if v and k not in _FREE_ADAPTER_FIELDS},
        "data": {
            "fingerprint": inputs.fingerprint,
            "rows": len(inputs.train),
            "order": plan.digest(),
        },
        "settings": config.model_dump(exclude=_FREE_SETTINGS),
        "total_steps": total_steps,
    }
    return json.loads(json.dumps(identity, default=_plain, sort_keys=True))


def require_same(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, allowed: bool
) -> list[str]:
    """Return what differs between a saved identity and the current one, a line each.

    Raises:
        ConfigError: something differs, and it is not `allowed`.
    """
    found = [*_base_difference(saved.get("base"), current.get("base"))]
    for part in ("adapter", "data", "settings", "total_steps"):
        found += _differences(saved.get(part), current.get(part), part)
    if found and not allowed:
        raise ConfigError(
            "the run to resume was another one: " + "; ".join(found),
            hint="set it back, choose another output_dir, or set resume_with_changes: true",
        )
    return found


def _base_difference(saved: Any, current: Any) -> list[str]:
    if saved is None or current is None or is_same_base(saved, current):
        return []
    return ["the base model has other weights"]


def _differences(saved: Any, current: Any, name: str) -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = sorted(saved.keys() | current.keys())
        return [
            line
            for key in keys
            for line in _differences(saved.get(key), current.get(key), f"{name}.{key}")
        ]
    return [] if saved == current else [f"{name} was {saved!r}, is {current!r}"]


def _plain(value: Any) -> Any:
    """Return what JSON cannot hold as something that it can: sets sorted, the rest as text."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
