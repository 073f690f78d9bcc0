import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from halfbyte.checkpoint.publish import MANIFEST, publish, publish_resumably, sha256, verify
from halfbyte.errors import CheckpointError


def make(final, content="new", **settings):
    with publish(final, **settings) as partial:
        (partial / "weights").write_text(content)
        (partial / "sub").mkdir()
        (partial / "sub" / "more").write_text("more")


def interrupt(final, **settings):
    with publish(final, **settings) as partial:
        (partial / "weights").write_text("half")
        raise KeyboardInterrupt


def left_over(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_appears_whole_with_a_manifest(tmp_path):
    final = tmp_path / "out"
    with publish(final) as partial:
        (partial / "weights").write_text("new")
        assert not final.exists()
    assert (final / "weights").read_text() == "new"
    assert set(json.loads((final / MANIFEST).read_text())["files"]) == {"weights"}
    assert left_over(tmp_path) == []
    verify(final)


def test_makes_the_folders_above(tmp_path):
    make(tmp_path / "a" / "b" / "out")
    verify(tmp_path / "a" / "b" / "out")


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_one(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert left_over(tmp_path) == []
    verify(tmp_path / "out")


def test_replaces_only_when_allowed(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(CheckpointError, match="already exists"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "old"
    make(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert left_over(tmp_path) == []


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    verify(tmp_path / "out")


def test_a_file_in_the_place_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        make(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_case_72_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot write"):
        make(tmp_path / "out")


def test_case_72_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        make(tmp_path / "file" / "out")


def test_case_73_what_cannot_be_synced_is_not_published(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        make(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_case_71_a_full_disk_leaves_the_old_one(tmp_path):
    make(tmp_path / "out", "old")
    script = """
        import resource, signal, sys
        from pathlib import Path
        from halfbyte.checkpoint.publish import publish
        from halfbyte.errors import CheckpointError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with publish(Path(sys.argv[1]), overwrite=True) as partial:
                (partial / "weights").write_bytes(b"x" * 10_000)
        except CheckpointError as error:
            print(error.message)
    """
    result = run(script, tmp_path / "out")
    assert "File too large" in result.stdout
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("swaps", [True, False])
def test_case_70_a_kill_at_any_step_leaves_the_old_or_the_new_one(tmp_path, call, swaps):
    make(tmp_path / "out", "old")
    script = """
        import os, pathlib, signal, sys
        from halfbyte.checkpoint import publish as module
        from halfbyte.checkpoint.publish import publish
        calls = 0
        def dying(function):
            def call(*arguments):
                global calls
                calls += 1
                if calls == int(sys.argv[2]):
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)
            return call
        os.fsync = dying(os.fsync)
        pathlib.Path.rename = dying(pathlib.Path.rename)
        module._exchanged = dying(module._exchanged if sys.argv[3] == "True" else lambda *_: False)
        with publish(pathlib.Path(sys.argv[1]), overwrite=True) as partial:
            (partial / "weights").write_text("new")
    """
    result = run(script, tmp_path / "out", call, swaps)
    final = tmp_path / "out"
    if final.exists():
        verify(final)
        whole = ("new",) if result.returncode == 0 else ("old", "new")
        assert (final / "weights").read_text() in whole
    else:
        # Between the two renames the old one lies beside its place, whole.
        assert not swaps
        assert result.returncode == -signal.SIGKILL
        (old,) = tmp_path.glob(".out.*.old")
        verify(old)


def run(script, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights").write_text("neW"),
        lambda folder: (folder / "weights").write_text("news"),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text('{"version": 1}'),
        lambda folder: (folder / MANIFEST).write_text('{"version": 1, "files": []}'),
    ],
)
def test_cases_7_and_74_damage_is_found(tmp_path, damage):
    make(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError):
        verify(tmp_path / "out")


def test_case_76_a_manifest_of_another_version_names_both(tmp_path):
    make(tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(CheckpointError, match=r"version 2.*version 1"):
        verify(tmp_path / "out")


def test_case_84_odd_names_work(tmp_path):
    make(tmp_path / "two words\nünïcode")
    verify(tmp_path / "two words\nünïcode")


def test_sha256_is_that_of_the_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file").startswith("ba7816bf8f01cfea")


PURPOSE = {"what": "weights", "size": 1}


def start_resumable(final, purpose=PURPOSE, error=None, **settings):
    with publish_resumably(final, purpose, **settings) as (partial, journal):
        found = [entry["file"] for entry in journal.entries]
        (partial / "weights").write_text("new")
        journal.add({"file": "weights"})
        if error is not None:
            raise error
    return found


def test_resumable_appears_whole_without_its_journal(tmp_path):
    assert start_resumable(tmp_path / "out") == []
    verify(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, "weights"]
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_may_go_better_next_time_is_kept(tmp_path, error):
    with pytest.raises((KeyboardInterrupt, CheckpointError)) as caught:
        start_resumable(tmp_path / "out", error=error)
    if isinstance(error, OSError):
        assert "No space left" in caught.value.message
        assert "same command again" in caught.value.hint
    assert start_resumable(tmp_path / "out") == ["weights"]
    assert left_over(tmp_path) == []


def test_an_error_that_would_come_again_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="wrong"):
        start_resumable(tmp_path / "out", error=ValueError("wrong"))
    assert list(tmp_path.iterdir()) == []


def test_another_purpose_begins_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start_resumable(tmp_path / "out", error=KeyboardInterrupt())
    assert start_resumable(tmp_path / "out", {"what": "other"}) == []


def test_two_writers_of_one_folder_are_refused(tmp_path):
    with publish_resumably(tmp_path / "out", PURPOSE) as (partial, _):
        (partial / "weights").write_text("mine")
        with pytest.raises(CheckpointError, match="another process is writing"):
            start_resumable(tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "mine"


def test_resumable_replaces_only_when_allowed(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(CheckpointError, match="already exists"):
        start_resumable(tmp_path / "out")
    start_resumable(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert left_over(tmp_path) == []
