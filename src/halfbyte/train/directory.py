"""A run's output directory: whose it is, what is in it, and what may go.

out/
  adapter_model.safetensors, adapter_config.json, tokenizer files    the result
  run.json            what was run, and whether it finished
  metrics.jsonl       one line a step or evaluation
  checkpoint-<step>/  whole or not there (halfbyte.checkpoint.publish)
  .lock               who is writing here now
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from halfbyte.checkpoint.publish import verify
from halfbyte.errors import CheckpointError, ConfigError

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
_LOCK_FILE = ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|tokenizer)\.[0-9a-f]+\.(partial|old)|\..*\.tmp")
_RESULT_FILES = ("adapter_config.json", "adapter_model.safetensors", RUN_FILE, METRICS_FILE)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the directory and hold its lock; the system releases it when the process ends, however.

    Raises:
        ConfigError: another process trains into it, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / _LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"output_dir {directory} cannot be written: {error.strerror}",
            hint="choose a directory that you may write to",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ConfigError(
                f"output_dir {directory} is in use by another run ({file.read().strip()})",
                hint="wait for it to end, or choose another output_dir",
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every checkpoint directory, the latest step first."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def read_run(directory: Path) -> dict[str, Any] | None:
    """Return run.json, or `None` where there is none that can be read."""
    try:
        content = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def is_finished(directory: Path) -> bool:
    """Whether a run came to its end here."""
    run = read_run(directory)
    return run is not None and run.get("status") == "finished"


def refuse_taken(directory: Path, *, overwrite: bool, resume: bool) -> None:
    """Find, before anything is written, that the directory is another run's.

    Raises:
        ConfigError: a run is going on here; or an earlier one is here, and it is neither
            overwritten nor resumed.
    """
    if directory.is_dir():
        with locked(directory):
            claim(directory, overwrite=overwrite, resume=resume)


def claim(directory: Path, *, overwrite: bool, resume: bool) -> None:
    """Make sure that no earlier run is lost or mixed with a new one.

    Raises:
        ConfigError: an earlier run is here, and it is neither overwritten nor resumed.
    """
    if overwrite or resume:
        return
    finished, saved = is_finished(directory), checkpoints(directory)
    if finished or saved:
        what = "a finished run" if finished else f"a run that was stopped ({saved[0][1].name})"
        raise ConfigError(
            f"output_dir {directory} already holds {what}",
            hint="set resume_from_checkpoint: auto to go on with it, overwrite_output_dir: true to "
            "remove it, or choose another output_dir",
        )


def clear(directory: Path) -> None:
    """Remove an earlier run's checkpoints, adapter and records, and nothing else."""
    for _, path in checkpoints(directory):
        remove_checkpoint(path)
    for name in _RESULT_FILES:
        (directory / name).unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what a crash left half-written."""
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that a crash in between leaves it whole or gone."""
    hidden = path.with_name(f".{path.name}.0.old")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def keep_newest(directory: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, which counts from the newest valid one."""
    found = [path for _, path in checkpoints(directory)]
    if limit is None or len(found) <= limit:
        return
    newest = next((i for i, path in enumerate(found) if _is_valid(path)), len(found))
    for path in found[newest + limit :]:
        remove_checkpoint(path)


def _is_valid(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except (CheckpointError, OSError):
        return False
    return True


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the system and safetensors say of a full or lost disk into one of our errors."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"writing {path} failed: {error}", hint="make room or mend the directory, then resume"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write that takes the place of `path`, synced and whole, at the end."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a crash leaves the old file or the new one."""
    with disk_errors(path), replacing(path) as temporary:
        text = json.dumps(content, indent=2, sort_keys=True, default=str)
        temporary.write_text(text + "\n", encoding="utf-8")
