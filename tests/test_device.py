"""Where we run, and in which dtype."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from halfbyte.device import (
    ALLOCATOR_VARIABLES,
    JOINING,
    available_bytes,
    can_join_memory,
    compute_dtype,
    container_bytes,
    default_device,
    join_memory,
    peak_bytes,
    peak_rss_bytes,
    release_unused_memory,
    resolve_device,
)
from halfbyte.errors import DeviceError


@pytest.mark.parametrize("name", [None, "auto"])
def test_the_default_is_the_gpu_where_there_is_one(name):
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device(name).type == default_device().type == expected


def test_names_and_devices_are_taken():
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


def test_what_is_no_device_is_an_error():
    with pytest.raises(DeviceError, match="expected a device such as 'cuda'"):
        resolve_device("gpu9000")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_an_error_with_a_hint():
    with pytest.raises(DeviceError, match="sees no CUDA device") as caught:
        resolve_device("cuda")
    assert "halfbyte doctor" in caught.value.hint


@pytest.fixture
def told(monkeypatch):
    """Return a function: what the allocator is told on Linux after `join_memory`, by variable."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # what join_memory sets goes with the test
        monkeypatch.delenv(name)

    def told():
        join_memory()
        return {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}

    return told


def test_free_memory_is_joined_unless_the_user_said_something(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert told() == {"PYTORCH_ALLOC_CONF": JOINING}
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "max_split_size_mb:64")
        assert told() == {name: "max_split_size_mb:64"}
        monkeypatch.delenv(name)


def test_free_memory_stays_in_pieces_where_joining_is_too_late_or_fails(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not told()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for release in ("5.15.167.4-microsoft-standard-WSL2", "5.15.148-tegra"):
        monkeypatch.setattr(platform, "release", lambda release=release: release)
        assert not told()
        assert not can_join_memory()
    monkeypatch.setattr(platform, "release", lambda: "10")
    monkeypatch.setattr(sys, "platform", "win32")
    assert not told()


def test_the_allocator_has_not_read_its_settings_when_torch_is_imported():
    code = (
        "import torch; from halfbyte.device import join_memory; join_memory();"
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    variables = {n: v for n, v in os.environ.items() if n not in ALLOCATOR_VARIABLES}
    found = subprocess.run(
        [sys.executable, "-c", code], env=variables, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == (JOINING if can_join_memory() else "")


def test_matrices_are_multiplied_in_a_dtype_that_the_device_is_good_at():
    assert compute_dtype("cpu") in (torch.bfloat16, torch.float32)


def test_the_peak_covers_what_was_allocated():
    block = torch.ones(2**26)  # 256 MiB, touched
    assert peak_rss_bytes() >= block.nbytes
    assert peak_bytes("cpu") == peak_rss_bytes()
    del block
    release_unused_memory("cpu")
    assert peak_rss_bytes() >= 2**28


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts otherwise")
def test_the_peak_is_not_that_of_the_parent():
    """ru_maxrss of a forked process begins with its parent's."""
    code = "from halfbyte.device import peak_rss_bytes; print(peak_rss_bytes())"
    parent = (
        "import subprocess, sys; ballast = bytearray(b'x') * (3 << 30 >> 1); "
        "sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    )
    command = [sys.executable, "-c", parent, code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 << 29


def test_available_bytes_are_some_of_those_that_there_are():
    available = available_bytes("cpu")
    assert available is None or available > 1 << 20


def test_available_bytes_of_a_gpu_stay_within_what_the_process_may_take(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30)
    for share, expected in ((1.0, 60), (0.5, 20), (0.2, 0)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _, s=share: s)
        assert available_bytes("cuda") == expected


def test_a_container_has_what_its_limit_leaves_beside_cached_files(tmp_path):
    assert container_bytes(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 50\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_bytes(tmp_path) == 450
