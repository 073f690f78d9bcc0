"""Checkpoints are written while training goes on, one at a time.

    training thread    step 9 | copy | step 10 | step 11 | step 12 ...
    writing thread            | write, sync, manifest, rename, remove old ones |

A kill at any moment leaves what was published before and a hidden directory that is cleaned up.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peft import PeftModel

from halfbyte.adapters.io import adapter_tensors, describe_adapter
from halfbyte.memory.host_copy import HostBuffers
from halfbyte.optim.adamw import AdamW
from halfbyte.train.directory import disk_errors, keep_newest
from halfbyte.train.events import CheckpointSaved
from halfbyte.train.result import versions
from halfbyte.train.rng import generator_states
from halfbyte.train.state import Progress, Snapshot, describe_state, write_checkpoint


class CheckpointWriter:
    """Saves a run. As a context manager it lets the write in flight end when the block does.

    Args:
        output_dir: Where checkpoints go.
        model: Whose active adapter is saved.
        optimizer: Saved with it.
        identity: What the run is made of.
        steps_per_epoch: Tells the position in the data.
        limit: How many checkpoints are kept; `None` for all.
    """

    def __init__(
        self,
        output_dir: Path,
        model: PeftModel,
        optimizer: AdamW,
        identity: Mapping[str, Any],
        *,
        steps_per_epoch: int,
        limit: int | None,
    ) -> None:
        self._output_dir = output_dir
        self._model, self._optimizer, self._identity = model, optimizer, identity
        self._steps_per_epoch, self._limit = steps_per_epoch, limit
        self._adapter_buffers, self._optimizer_buffers = HostBuffers(), HostBuffers()
        self._description = describe_adapter(model, model.active_adapter)
        self._versions = versions()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future[CheckpointSaved] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True)

    def save(self, progress: Progress) -> None:
        """Copy the run's state as it is now, and begin to write it. `finished` says how it went.

        Raises:
            RuntimeError: the result of the write before was not asked for.
        """
        if self._in_flight is not None:
            raise RuntimeError("ask for the result of one write before the next one begins")
        snapshot = Snapshot(
            step=progress.step,
            adapter=self._adapter_buffers.copy(
                adapter_tensors(self._model, self._model.active_adapter)
            ),
            optimizer=self._optimizer_buffers.copy(self._optimizer.state_dict()),
            description=self._description,
            state=describe_state(
                progress,
                self._identity,
                steps_per_epoch=self._steps_per_epoch,
                versions=self._versions,
            ),
            generators=generator_states(),
        )
        self._in_flight = self._thread.submit(self._write, snapshot)

    def finished(self, *, wait: bool) -> CheckpointSaved | None:
        """Return the checkpoint that was written, once, or `None` while there is none.

        Args:
            wait: For the write in flight to end.

        Raises:
            CheckpointError: it could not be written; what was there before is untouched.
            AdapterError: the adapter holds NaN or Inf.
        """
        writing = self._in_flight
        if writing is None or not (wait or writing.done()):
            return None
        try:
            return writing.result()
        finally:
            self._in_flight = None

    def _write(self, snapshot: Snapshot) -> CheckpointSaved:
        start = time.perf_counter()
        path = write_checkpoint(self._output_dir, snapshot)
        with disk_errors(self._output_dir):
            keep_newest(self._output_dir, self._limit)
        return CheckpointSaved(snapshot.step, path, time.perf_counter() - start)
