"""Read a model's tensors ahead of whoever takes them, onto the device.

transformers takes one tensor, quantizes it, and takes the next, in the natural order of the names.
Threads here read the next ones meanwhile. On a CPU a tensor is read into memory of its own. On a
GPU it goes through two pinned buffers a thread: while one is copied to the device the other is
filled from the file, and no whole tensor is ever held on the host. However large the checkpoint is,
what is held at once is a few tensors.
"""

import os
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import EllipsisType, TracebackType

import torch
from torch import Tensor

from halfbyte.checkpoint.header import TensorInfo
from halfbyte.checkpoint.reader import CheckpointReader, read_into, read_tensor

_CHUNK_BYTES = 8 * 2**20
# One thread copies about 8 GB/s out of the page cache, a GPU takes in some 50.
_MAX_THREADS_GPU = 4


class ReadAhead:
    """The tensors of a folder, on `device`; `state_dict` is what `from_pretrained` takes.

    Args:
        reader: The folder.
        device: Where the tensors go.
    """

    def __init__(self, reader: CheckpointReader, device: torch.device) -> None:
        self._reader = reader
        self._names = sorted(reader.names(), key=_natural)
        self._places = {name: place for place, name in enumerate(self._names)}
        self._device = device
        is_gpu = device.type == "cuda"
        self._taker = torch.cuda.current_stream(device) if is_gpu else None
        self._num_threads = min(_MAX_THREADS_GPU, os.cpu_count() or 1) if is_gpu else 1
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="read-ahead")
        self._local = threading.local()
        self._pending: dict[str, Future[Tensor]] = {}

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def state_dict(self) -> "dict[str, Untaken]":
        """Return every name with a tensor that is read when it is indexed with `...`."""
        return {name: Untaken(self, name) for name in self._names}

    def take(self, name: str) -> Tensor:
        """Return a tensor, and have the ones after it read.

        Raises:
            CheckpointError: there is no such tensor, or the file ends early.
        """
        self._reader.info(name)
        place = self._places[name]
        for passed in [other for other in self._pending if self._places[other] < place]:
            self._pending.pop(passed).cancel()
        for later in self._names[place : place + 1 + self._num_threads]:
            if later not in self._pending:
                self._pending[later] = self._pool.submit(self._read, later)
        return self._pending.pop(name).result()

    def _read(self, name: str) -> Tensor:
        info = self._reader.info(name)
        if self._taker is None:
            return read_tensor(name, info)
        if not hasattr(self._local, "lane"):
            self._local.lane = _Lane(self._device, _CHUNK_BYTES)
        lane: _Lane = self._local.lane
        # Memory that the taker's stream has let go of may still be read by its kernels.
        with torch.cuda.stream(self._taker):
            target = torch.empty(info.shape, dtype=info.dtype, device=self._device)
        lane.after(self._taker)
        lane.carry(name, info, target)
        lane.finish()
        return target


class Untaken:
    """A tensor that is read when it is indexed with `...`, as safetensors' slices are."""

    def __init__(self, ahead: ReadAhead, name: str) -> None:
        self._ahead = ahead
        self._name = name

    def __getitem__(self, index: EllipsisType) -> Tensor:
        return self._ahead.take(self._name)


class _Lane:
    """Two buffers and a stream, by which one thread brings bytes to a device.

    On a CPU the same steps are done, one after the other.
    """

    def __init__(self, device: torch.device, chunk_bytes: int) -> None:
        is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._slots = [
            torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=is_gpu) for _ in range(2)
        ]
        self._copied = [torch.cuda.Event() for _ in self._slots] if is_gpu else []
        self._turn = 0

    def after(self, stream: torch.cuda.Stream) -> None:
        """Let copies wait for what `stream` was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(stream)

    def carry(self, name: str, info: TensorInfo, target: Tensor) -> None:
        """Bring the bytes of a tensor into `target`.

        Raises:
            CheckpointError: the file ends early.
        """
        to = target.view(-1).view(torch.uint8)
        size = self._slots[0].numel()
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            for start in range(0, info.num_bytes, size):
                self._turn = 1 - self._turn
                if self._copied:
                    self._copied[self._turn].synchronize()
                part = self._slots[self._turn][: min(size, info.num_bytes - start)]
                read_into(file, part.numpy().data, name, info)
                with torch.cuda.stream(self._stream):  # None: does nothing
                    to[start : start + part.numel()].copy_(part, non_blocking=True)
                if self._stream is not None:
                    self._copied[self._turn].record(self._stream)

    def finish(self) -> None:
        """Wait for the last copies."""
        if self._stream is not None:
            self._stream.synchronize()


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that orders layer 2 before layer 10, as transformers takes them."""
    parts = re.findall(r"\d+|[^\d.]+", name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]
