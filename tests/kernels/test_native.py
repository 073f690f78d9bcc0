import os
import shutil
import stat
import subprocess

import pytest

from halfbyte.kernels import native

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "halfbyte"
    native.library.cache_clear()


@needs_compiler
def test_compiles_once_into_the_users_cache(fresh, monkeypatch):
    assert native.library() is not None
    built = set(fresh.iterdir())
    assert {path.suffix for path in built} == {".so", ".sha256"}
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    native.library.cache_clear()
    monkeypatch.setattr(native, "compile_library", lambda *_: pytest.fail("compiled again"))
    assert native.library() is not None
    assert set(fresh.iterdir()) == built


def test_without_a_compiler_there_is_no_library(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert native.library() is None
    assert not fresh.exists()


@needs_compiler
def test_a_source_that_does_not_compile_leaves_nothing_behind(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "broken.c"
    broken.write_text("int main(")
    monkeypatch.setattr(native, "_SOURCE", broken)
    assert native.library() is None
    assert list(fresh.iterdir()) == []


@needs_compiler
def test_a_compiler_that_knows_no_option_still_serves(fresh, tmp_path):
    # Stands for a compiler without OpenMP and without -march=native.
    plain = tmp_path / "plain-cc"
    plain.write_text(
        '#!/bin/sh\nfor a in "$@"; do case "$a" in -march=*|-fopenmp) exit 1;; esac; done\n'
        'exec cc "$@"\n'
    )
    plain.chmod(0o755)
    path = fresh / "library.so"
    native.compile_library(str(plain), path)
    assert path.stat().st_size > 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_error(fresh, tmp_path):
    tmp_path.chmod(0o500)
    assert native.library() is None


@needs_compiler
def test_a_damaged_library_is_built_again(fresh):
    path = fresh / f"cpu-loops-{native._fingerprint(shutil.which('cc'))}.so"
    fresh.mkdir()
    path.write_bytes(b"not a library")
    assert native.library() is not None
    whole = path.read_bytes()
    path.unlink()  # it is loaded: written over in place it would take this process down
    path.write_bytes(whole[:-1000] + bytes(1000))
    native.library.cache_clear()
    assert native.library().hb_adamw8.restype is None
    assert path.read_bytes() == whole


@needs_compiler
def test_the_sources_compile_without_warnings(tmp_path):
    flags = [*native._FLAGS, "-Wall", "-Wextra", "-Werror", "-fopenmp"]
    sources = [str(native._SOURCE), str(native._DECODER_SOURCE)]
    command = ["cc", *flags, "-o", str(tmp_path / "x.so"), *sources]
    subprocess.run(command, check=True)
