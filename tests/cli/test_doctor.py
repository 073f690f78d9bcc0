"""halfbyte doctor says what is there and what is missing."""

import platform
import shutil

from halfbyte.cli.doctor import memory_bytes


def test_it_lists_versions_machine_and_hints(run):
    result = run("doctor")
    assert result.exit_code == 0
    assert platform.python_version() in result.stdout
    for name in ("torch", "transformers", "bitsandbytes", "(optional)", "memory", "device"):
        assert name in result.stdout


def test_a_full_disk_is_hinted_at(run, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1024))
    assert "hint: less than 20.0 GiB of disk are free" in run("doctor").stdout


def test_memory_is_plausible():
    assert memory_bytes() > 2**28
