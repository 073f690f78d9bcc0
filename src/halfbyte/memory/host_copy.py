"""Tensors as they are now, copied to host memory while the device goes on.

On a GPU the copies are put in line behind the work that is queued: nothing waits, and what comes
later in the line cannot change what they take. Whoever reads them waits for the copies alone.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class HostBuffers:
    """Host memory that tensors are copied into, and used again by the next copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> "HostCopy":
        """Return copies of `tensors`, contiguous; those of the call before are overwritten."""
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = self._buffers[name] = _host_memory(tensor)
            buffer.copy_(tensor.detach(), non_blocking=True)
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        events = [torch.cuda.current_stream(device).record_event() for device in devices]
        return HostCopy({name: self._buffers[name] for name in tensors}, tuple(events))


def _host_memory(tensor: Tensor) -> Tensor:
    """Return memory for a copy of `tensor`; where none can be pinned, the copy will wait."""
    if tensor.is_cuda:
        with contextlib.suppress(RuntimeError):
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype)


@dataclass(frozen=True)
class HostCopy:
    """Copies that may still be under way."""

    _tensors: Mapping[str, Tensor]
    _events: tuple[torch.cuda.Event, ...] = ()

    def wait(self) -> dict[str, Tensor]:
        """Return the copies once they are whole."""
        for event in self._events:
            event.synchronize()
        return dict(self._tensors)
