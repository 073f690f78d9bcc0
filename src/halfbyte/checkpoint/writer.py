"""Write a model's tensors to safetensors files, one tensor at a time.

The order of tensors in a file, and so its header, is known only when its last tensor is. Each
tensor therefore goes to a spool file first, and a full spool is copied, behind a header, to its
shard. No more than one tensor is in memory, and the files equal those of
`safetensors.torch.save_file` byte by byte.

With a journal, each whole shard is noted in it, and a writer that finds such notes goes on behind
them: shards that still have their size and SHA-256 are kept, everything else is written again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from halfbyte.checkpoint.header import DTYPES
from halfbyte.checkpoint.journal import Journal
from halfbyte.checkpoint.publish import sha256
from halfbyte.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from halfbyte.errors import CheckpointError

_CHUNK_BYTES = 1 << 22
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


class ShardedWriter:
    """Takes tensors one by one, and leaves `model.safetensors` or shards with their index.

    As a context manager it closes itself when the block ends without an error.

    Args:
        folder: Existing folder to write to.
        max_shard_bytes: Most bytes of tensors in a shard; a larger tensor gets one of its own.
        journal: Where whole shards are noted, and found again.

    Attributes:
        notes: What the caller noted with the tensors so far, those of kept shards included.
    """

    def __init__(
        self,
        folder: Path | str,
        max_shard_bytes: int = 5_000_000_000,
        journal: Journal | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self.notes: dict[str, Any] = {}
        self._journal = journal
        self._spool: _Spool | None = None
        self._shards: list[dict[str, Any]] = []
        self._names: set[str] = set()
        if journal is not None:
            self._recover(journal)
        self._kept = set(self._names)

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()

    def add(self, name: str, tensor: Tensor, *, notes: Mapping[str, Any] | None = None) -> None:
        """Write a tensor, on any device, to this shard or to the next one.

        A tensor of a kept shard is not written again.

        Args:
            name: Its name.
            tensor: Its value.
            notes: JSON values to remember once it is written.

        Raises:
            CheckpointError: the name is there already, or the disk does not take it.
        """
        if name in self._kept:
            self._kept.discard(name)
            return
        if name in self._names:
            raise CheckpointError(f"the tensor {name!r} was written twice")
        if self._spool and self._spool.num_bytes + tensor.nbytes > self.max_shard_bytes:
            self._finish_shard()
        if self._spool is None:
            self._spool = _Spool(self.folder / "spool.partial")
        self._names.add(name)
        self._spool.append(name, tensor.detach())
        self._spool.notes |= notes or {}
        self.notes |= notes or {}

    def close(self) -> None:
        """Write the last shard, give all shards their names, and write the index.

        Raises:
            CheckpointError: nothing was added, or the disk does not take it.
        """
        if self._spool is not None:
            self._finish_shard()
        count = len(self._shards)
        if count == 0:
            raise CheckpointError(f"no tensor was written to {self.folder}")
        if count == 1:
            self._unnamed(0).rename(self.folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(self._shards):
            name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._unnamed(i).rename(self.folder / name)
            weight_map |= dict.fromkeys(shard["tensors"], name)
        total_bytes = sum(shard["tensor_bytes"] for shard in self._shards)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.folder / INDEX_FILE).write_text(text, encoding="utf-8")

    def _unnamed(self, index: int) -> Path:
        return self.folder / f"model-{index + 1:05d}.partial"

    def _finish_shard(self) -> None:
        if self._spool is None:
            return
        shard = self._spool.finish(self._unnamed(len(self._shards)))
        self._shards.append(shard)
        self._spool = None
        if self._journal is not None:
            self._journal.add(shard)

    def _recover(self, journal: Journal) -> None:
        """Take over the whole shards of an interrupted writer; remove whatever else it left."""
        count = len(journal.entries)
        for i, shard in enumerate(journal.entries):
            path = self._unnamed(i)
            # The interruption may have come while shards were given their names.
            for name in (SINGLE_FILE, f"model-{i + 1:05d}-of-{count:05d}.safetensors"):
                if (self.folder / name).is_file():
                    (self.folder / name).rename(path)
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"] or sha256(path) != shard["sha256"]:
                journal.keep(i)
                break
            self._shards.append(shard)
            self._names |= set(shard["tensors"])
            self.notes |= shard["notes"]
        kept = {journal.path, *(self._unnamed(i) for i in range(len(self._shards)))}
        for path in set(self.folder.iterdir()) - kept:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class _Spool:
    """The tensors of one shard, in the order in which they came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self.places: dict[str, tuple[int, torch.dtype, list[int], int]] = {}
        self.notes: dict[str, Any] = {}
        path.unlink(missing_ok=True)

    def append(self, name: str, tensor: Tensor) -> None:
        flat = tensor.cpu().contiguous().view(-1)
        self.places[name] = (self.num_bytes, tensor.dtype, list(tensor.shape), tensor.nbytes)
        self.num_bytes += tensor.nbytes
        try:
            with self.path.open("ab") as file:
                file.write(flat.view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(f"writing {name!r} failed: {error}") from error

    def finish(self, path: Path) -> dict[str, Any]:
        """Copy the spool behind a header to `path`, synced; return what there is to know of it."""
        order = sorted(self.places, key=lambda name: (-_RANKS[self.places[name][1]], name))
        digest = hashlib.sha256()
        try:
            with path.open("wb") as target, self.path.open("rb") as source:
                for chunk in self._chunks(source, order):
                    digest.update(chunk)
                    target.write(chunk)
                target.flush()
                os.fsync(target.fileno())
            self.path.unlink()
        except OSError as error:
            raise CheckpointError(f"writing {path} failed: {error}") from error
        return {
            "bytes": path.stat().st_size,
            "sha256": digest.hexdigest(),
            "tensor_bytes": self.num_bytes,
            "tensors": list(self.places),  # in the order in which they came
            "notes": self.notes,
        }

    def _chunks(self, source: BinaryIO, order: list[str]) -> Iterator[bytes]:
        """Yield the bytes of the shard."""
        yield self._header(order)
        for name in order:
            start, _, _, num_bytes = self.places[name]
            source.seek(start)
            for done in range(0, num_bytes, _CHUNK_BYTES):
                yield source.read(min(_CHUNK_BYTES, num_bytes - done))

    def _header(self, order: list[str]) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in order:
            _, dtype, shape, num_bytes = self.places[name]
            offsets = [end, end + num_bytes]
            header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": offsets}
            end += num_bytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
