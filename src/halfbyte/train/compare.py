"""Two runs' directories compared: adapter, optimizer state, and what every step measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.train.directory import METRICS_FILE

_MEASURES = ("event", "loss", "grad_norm", "learning_rate")
_BATCH = ("tokens", "supervised_tokens")


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common.

    Attributes:
        adapter: What of the adapter differs; empty where nothing does.
        optimizer: The same for the optimizer's state.
        first_step: The first step whose loss, gradient norm or learning rate differ.
        same_batches: Whether every step had as many tokens, and as many supervised ones.
        sizes: What was compared, in words.
    """

    adapter: str
    optimizer: str
    first_step: int | None
    same_batches: bool
    sizes: Mapping[str, str]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.adapter or self.optimizer or self.first_step) and self.same_batches

    @property
    def facts(self) -> dict[str, str]:
        """What was compared, and how that went, by name."""
        equal = "equal, bit for bit"
        steps = f"differ from step {self.first_step} on" if self.first_step else equal
        return {
            "adapter": f"{self.sizes['adapter']}: {self.adapter or equal}",
            "optimizer": f"{self.sizes['optimizer']}: {self.optimizer or equal}",
            "loss, gradient": f"{self.sizes['steps']}: {steps}",
            "batches": "the same, in the same order" if self.same_batches else "others",
        }

    def verdict(self, kill_at: int, *, deterministic: bool) -> str:
        """Say in one sentence what that means, where the second run was killed after a step."""
        if self.is_equal:
            return f"killed after step {kill_at} and resumed, this run ends with the same bits"
        if not self.same_batches:
            return "DIFFERENT: the resumed run saw other batches; please report this as a mistake"
        if self.first_step is not None and self.first_step < kill_at:
            advice = "please report it" if deterministic else "set deterministic: true"
            return (
                f"DIFFERENT, but not by resuming: step {self.first_step} differs before the kill, "
                f"so two undisturbed runs differ here too; {advice}"
            )
        if not deterministic:
            return "DIFFERENT: set deterministic: true and try again"
        return "DIFFERENT after resuming, although deterministic: please report this as a mistake"


def compare_runs(first: Path, second: Path, *, step: int) -> Comparison:
    """Compare two finished runs that saved a checkpoint after `step`, their last step.

    Raises:
        CheckpointError: a file is missing.
    """
    checkpoint = f"checkpoint-{step}"
    adapters = [_tensors(run / "adapter_model.safetensors") for run in (first, second)]
    states = [_tensors(run / checkpoint / "optimizer.safetensors") for run in (first, second)]
    ours, others = (_steps(run / METRICS_FILE) for run in (first, second))
    return Comparison(
        adapter=differences(*adapters),
        optimizer=differences(*states),
        first_step=_first_difference(ours, others, _MEASURES),
        same_batches=_first_difference(ours, others, _BATCH) is None,
        sizes={
            "adapter": _size(adapters[0]),
            "optimizer": _size(states[0]),
            "steps": f"steps 1 to {step}",
        },
    )


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str:
    """Say in how many tensors two sets differ and where most; empty where all bits are equal."""
    if first.keys() != second.keys():
        return f"other tensors: {sorted(first.keys() ^ second.keys())[:3]}"
    found = [name for name in first if not _same_bits(first[name], second[name])]
    if not found:
        return ""
    worst = max(found, key=lambda name: _distance(first[name], second[name]))
    distance = _distance(first[worst], second[worst])
    return f"{len(found)} of {len(first)} tensors differ, most by {distance:.3g} in {worst}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*flat)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return (a.double() - b.double()).abs().max().item()


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so there is nothing to compare")
    return load_file(path)


def _size(tensors: Mapping[str, Tensor]) -> str:
    return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values"


def _steps(path: Path) -> dict[int, dict[str, Any]]:
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {record["step"]: record for record in records if record["event"].endswith("step")}


def _first_difference(
    first: Mapping[int, dict[str, Any]], second: Mapping[int, dict[str, Any]], names: tuple
) -> int | None:
    for step in sorted(first.keys() | second.keys()):
        records = first.get(step, {}), second.get(step, {})
        if any(records[0].get(name) != records[1].get(name) for name in names):
            return step
    return None
