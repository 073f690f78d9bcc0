"""Everything that a resumed run needs, in a directory that appears whole or not at all.

    checkpoint-<step>/
      adapter_model.safetensors, adapter_config.json   the adapter as peft loads it
      optimizer.safetensors    both moments by parameter; float32 masters of what is not float32
      state.json               how far the run is, where in the data, its identity, versions
      rng.json                 the state of every generator
      manifest.json            size and SHA-256 of every file, written last

The learning rate, the order of rows and how they are packed are pure functions of seed and step, so
there is no other state of them to save; the identity holds a digest of rows and order, and a run
whose own differ is not resumed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file

from halfbyte.adapters.io import restore_adapter, write_tensors
from halfbyte.checkpoint.publish import publish, verify
from halfbyte.checkpoint.reader import read_file
from halfbyte.errors import CheckpointError
from halfbyte.memory.host_copy import HostCopy
from halfbyte.optim.adamw import AdamW
from halfbyte.train.directory import checkpoints, disk_errors
from halfbyte.train.gradients import StepResult
from halfbyte.train.rng import restore_generators

STATE_VERSION = 2
_STATE_FILE = "state.json"
_RNG_FILE = "rng.json"
_OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done, those that were skipped too.
        loss_total: Sum of the losses of all supervised tokens so far.
        seconds: Spent in steps, over all parts of a resumed run.
        skipped_steps: Steps that were left out, as they were not finite.
        max_tokens: Most tokens of a micro-step since memory ran out; another cut, other roundings.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    loss_total: float = 0.0
    seconds: float = 0.0
    skipped_steps: int = 0
    max_tokens: int | None = None

    def after_skip(self, seconds: float) -> "Progress":
        """Return the progress after a step that was left out."""
        return replace(
            self,
            step=self.step + 1,
            seconds=self.seconds + seconds,
            skipped_steps=self.skipped_steps + 1,
        )

    def after(self, result: StepResult, seconds: float) -> "Progress":
        """Return the progress after one more step."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + result.tokens,
            supervised_tokens=self.supervised_tokens + result.supervised_tokens,
            loss_total=self.loss_total + result.loss * result.supervised_tokens,
            seconds=self.seconds + seconds,
        )


@dataclass(frozen=True)
class SavedState:
    """A checkpoint that was found and verified."""

    path: Path
    progress: Progress
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, in host memory.

    Attributes:
        step: Optimizer steps done.
        adapter: The adapter's tensors under peft's names.
        optimizer: The optimizer's state.
        description: The adapter's JSON files by name.
        state: What stands in state.json.
        generators: What stands in rng.json.
    """

    step: int
    adapter: HostCopy
    optimizer: HostCopy
    description: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Any]
    generators: Mapping[str, Any]


def describe_state(
    progress: Progress,
    identity: Mapping[str, Any],
    *,
    steps_per_epoch: int,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return what state.json says."""
    epoch, step = divmod(progress.step, steps_per_epoch)
    return {
        "version": STATE_VERSION,
        "progress": asdict(progress),
        "next_batch": {"epoch": epoch, "step": step},
        "identity": dict(identity),
        "versions": dict(versions),
    }


def write_checkpoint(output_dir: Path, snapshot: Snapshot) -> Path:
    """Publish `checkpoint-<step>` and return its path.

    Raises:
        CheckpointError: it cannot be written; what was there before is untouched.
        AdapterError: the adapter holds NaN or Inf.
    """
    folder = output_dir / f"checkpoint-{snapshot.step}"
    if not output_dir.is_dir():
        raise CheckpointError(f"{output_dir} is gone", hint="do not remove it while a run goes on")
    with publish(folder, overwrite=True) as partial, disk_errors(folder):
        write_tensors(snapshot.adapter.wait(), snapshot.description, partial)
        optimizer = snapshot.optimizer.wait()
        save_file(optimizer, partial / _OPTIMIZER_FILE, metadata={"format": "pt"})
        _write_json(partial / _STATE_FILE, snapshot.state)
        _write_json(partial / _RNG_FILE, snapshot.generators)
    return folder


def read_checkpoint(folder: Path) -> SavedState:
    """Verify a checkpoint and return what it says of itself.

    Raises:
        CheckpointError: a file is missing or damaged, or another version wrote it.
    """
    verify(folder)
    path = folder / _STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if version != STATE_VERSION:
            raise CheckpointError(
                f"{path} has version {version}, this Halfbyte reads version {STATE_VERSION}",
                hint="resume with the Halfbyte that wrote it",
            )
        return SavedState(folder, Progress(**content["progress"]), dict(content["identity"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="resume from another checkpoint"
        ) from error


def find_checkpoint(output_dir: Path, resume: str) -> tuple[SavedState | None, list[str]]:
    """Return the checkpoint to resume from, and why newer ones were skipped.

    Args:
        output_dir: Where "auto" looks; it takes the newest that verifies.
        resume: "auto", or the path of a checkpoint.

    Raises:
        CheckpointError: the checkpoint that was named cannot be used, or none of several can.
    """
    if resume != "auto":
        return read_checkpoint(Path(resume)), []
    skipped: list[str] = []
    for _, path in checkpoints(output_dir):
        try:
            return read_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(f"skipped {path.name}: {error.message}")
    if skipped:
        raise CheckpointError(
            f"no checkpoint in {output_dir} can be used: " + "; ".join(skipped),
            hint="set overwrite_output_dir: true to start again from the beginning",
        )
    return None, skipped


def load_checkpoint(saved: SavedState, model: PeftModel, optimizer: AdamW) -> None:
    """Put a checkpoint's adapter, optimizer and generators in the place of the current ones.

    Raises:
        CheckpointError: the optimizer's state or the generators' do not fit.
        AdapterError: the adapter does not fit the model.
    """
    restore_adapter(model, saved.path, adapter=model.active_adapter)
    optimizer.load_state_dict(read_file(saved.path / _OPTIMIZER_FILE))
    path = saved.path / _RNG_FILE
    try:
        restore_generators(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="resume from another checkpoint"
        ) from error


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
