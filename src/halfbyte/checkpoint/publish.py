"""A directory that appears whole or not at all.

Files are written into a hidden directory beside the final one, synced, listed in a manifest with
sizes and SHA-256, and renamed into place; the parent directory is synced last. A crash at any
moment leaves the old directory or the new one, never a mixture. (Where two directories cannot be
swapped in one step, the old one has another name, `.<name>.<unique>.old`, for a moment.)

What takes long is published resumably: the hidden directory then has one name for each final one,
and a journal in it lists what is whole. After a crash the next call finds both and goes on.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.journal import JOURNAL_FILE, Journal
from halfbyte.errors import CheckpointError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_CHUNK_BYTES = 1 << 22
_AT_FDCWD = -100  # <fcntl.h>: paths are relative to the current directory
_RENAME_EXCHANGE = 2  # <linux/fs.h>


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, JOURNAL_FILE)
    )


def write_manifest(directory: Path) -> None:
    """Sync every file below `directory`, then write and sync `manifest.json` over all of them."""
    files = {}
    for path in _files(directory):
        _sync(path)
        name = path.relative_to(directory).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = directory / MANIFEST
    text = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=2, sort_keys=True)
    manifest.write_text(text + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(directory)


def verify(directory: Path) -> None:
    """Check every file of `directory` against its manifest.

    Raises:
        CheckpointError: the manifest or a file is missing, or a size or checksum differs.
    """
    manifest = directory / MANIFEST
    again = "use an older checkpoint, or copy this one again from where it came"
    # Here, because it brings torch along, which publishing does not need.
    from halfbyte.checkpoint.header import read_json

    content = read_json(manifest)
    try:
        version = content["version"]
        if version != MANIFEST_VERSION:
            raise CheckpointError(
                f"{manifest} has version {version}, this Halfbyte reads version {MANIFEST_VERSION}",
                hint="use the Halfbyte that wrote it",
            )
        files = {n: (entry["bytes"], entry["sha256"]) for n, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest} is no manifest: {error}", hint=again) from error
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{manifest} lists {name!r}, which leads out of its folder")
        path = directory / name
        if not os.path.isfile(path):  # false for names that can be no file's
            raise CheckpointError(f"{path} is listed in the manifest but missing", hint=again)
        if (path.stat().st_size, sha256(path)) != expected:
            raise CheckpointError(f"{path} differs from its checksum in the manifest", hint=again)


@contextlib.contextmanager
def publish(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `final`, whole, when the block ends without an error.

    Args:
        final: The directory to make.
        overwrite: Replace a directory that is already there (it stays until the new one is whole).

    Raises:
        CheckpointError: `final` exists and `overwrite` is false, or it cannot be written.
    """
    final = Path(final)
    check_free(final, overwrite=overwrite)
    partial = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.partial"
    _make_folder(partial)
    try:
        yield partial
        write_manifest(partial)
        _put_in_place(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"writing {final} failed: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def publish_resumably(
    final: Path, purpose: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[tuple[Path, Journal]]:
    """Yield a directory that becomes `final`, and the journal of what it holds already.

    What an interrupted call left is there again for the next one with the same `purpose`; anything
    else that was left is discarded. Errors that would come again leave nothing; a kill, an
    interrupt or a full disk leaves what is whole.

    Args:
        final: The directory to make.
        purpose: JSON values that tell what is written: equal ones must give equal bytes.
        overwrite: Replace a directory that is already there (it stays until the new one is whole).

    Raises:
        CheckpointError: `final` exists and `overwrite` is false, another process is writing it, or
            it cannot be written.
    """
    final = Path(final)
    check_free(final, overwrite=overwrite)
    partial = final.parent / f".{final.name}.partial"
    _make_folder(partial)
    with _locked(partial):
        journal = Journal(partial, purpose)
        try:
            yield partial, journal
            write_manifest(partial)
            journal.path.unlink()
            _put_in_place(partial, final)
        except BaseException as error:
            is_kept = bool(journal.entries) and _may_go_better(error)
            if not is_kept:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
                raise CheckpointError(
                    f"writing {final} failed: {getattr(error, 'message', error)}",
                    hint="make room and give the same command again: what is whole is kept"
                    if is_kept
                    else None,
                ) from error
            raise


def _may_go_better(error: BaseException) -> bool:
    """Whether the same call, made again, may succeed: after an interrupt, or with more room."""
    causes = (OSError, KeyboardInterrupt, SystemExit)
    return isinstance(error, causes) or isinstance(error.__cause__, OSError)


def check_free(final: Path, *, overwrite: bool) -> None:
    """Check that `final` may be made.

    Raises:
        CheckpointError: it exists and `overwrite` is false.
    """
    if final.exists() and not overwrite and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(
            f"{final} already exists", hint="choose another place, or allow it to be overwritten"
        )


def _make_folder(partial: Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {partial.parent}: {error.strerror}") from error


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock; the system releases it when the process ends, however."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it may have put the directory into its place meanwhile.
            is_ours = os.path.samestat(directory.stat(), os.fstat(descriptor))
        except OSError:
            is_ours = False
        if not is_ours:
            raise CheckpointError(
                f"another process is writing {directory}", hint="wait for it to end"
            )
        yield
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, final: Path) -> None:
    if final.exists():
        if _exchanged(partial, final):
            old = partial
        else:
            old = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.old"
            final.rename(old)
            partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(final)
    _sync(final.parent)


def _exchanged(first: Path, second: Path) -> bool:
    """Swap two paths in one step; return whether the system and the file system can."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux, since glibc 2.28
    if renameat2 is None:
        return False
    paths = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    return bool(renameat2(*paths, _RENAME_EXCHANGE) == 0)
