"""The output directory: locked, never mixed, never without its only valid checkpoint."""

import json
import os
import subprocess
import sys

import pytest

from halfbyte.checkpoint.publish import publish, verify
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.train.directory import (
    checkpoints,
    claim,
    clear,
    disk_errors,
    keep_newest,
    locked,
    remove_checkpoint,
    remove_leftovers,
    replacing,
    write_json,
)


def make_checkpoint(directory, step):
    with publish(directory / f"checkpoint-{step}") as partial:
        (partial / "state.json").write_text("{}")


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_lock_names_its_holder(tmp_path):
    with (
        locked(tmp_path / "out"),
        pytest.raises(ConfigError, match=rf"in use by another run \(process {os.getpid()} on "),
        locked(tmp_path / "out"),
    ):
        pass


def test_lock_of_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_text("process 999999 on elsewhere\n")
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_lock_ends_with_the_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), locked(tmp_path / "file" / "out"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"), locked(tmp_path):
        pass


def test_checkpoints_are_ordered_by_step(tmp_path):
    for step in (9, 100, 20):
        make_checkpoint(tmp_path, step)
    assert [step for step, _ in checkpoints(tmp_path)] == [100, 20, 9]


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    keep_newest(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("damaged", "kept"), [([3], [2, 3]), ([3, 2], [1, 2, 3]), ([3, 2, 1], [1, 2, 3])]
)
def test_case_82_the_only_valid_one_is_never_removed(tmp_path, damaged, kept):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    for step in damaged:
        (tmp_path / f"checkpoint-{step}" / "state.json").write_text("?!")
    keep_newest(tmp_path, 1)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_no_limit_keeps_all(tmp_path):
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
    keep_newest(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 2


def test_removing_is_never_half_visible(tmp_path):
    """Killed at any moment of the removal, a checkpoint is whole or not listed."""
    script = """
import os, shutil, sys
from pathlib import Path
from halfbyte.train.directory import remove_checkpoint
shutil.rmtree = lambda path, **_: os._exit(9) if path.exists() else None
remove_checkpoint(Path(sys.argv[1]))
"""
    make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2)
    command = [sys.executable, "-c", script, str(tmp_path / "checkpoint-1")]
    assert subprocess.run(command, check=False).returncode == 9
    assert [step for step, _ in checkpoints(tmp_path)] == [2]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    make_checkpoint(tmp_path, 1)
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path, overwrite=True, resume=False)
    assert len(names(tmp_path)) == 6  # not yet: the new run may still turn out to be impossible
    clear(tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_half_a_run_without_checkpoints_may_start_again(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"status": "running"}))
    claim(tmp_path, overwrite=False, resume=False)


def test_checkpoint_can_be_removed_twice_over(tmp_path):
    make_checkpoint(tmp_path, 1)
    (tmp_path / ".checkpoint-1.0.old").mkdir()
    remove_checkpoint(tmp_path / "checkpoint-1")
    assert names(tmp_path) == []


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})

    def fail():
        with disk_errors(path), replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space"):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["run.json"]


def test_published_checkpoint_verifies(tmp_path):
    make_checkpoint(tmp_path, 1)
    verify(tmp_path / "checkpoint-1")
