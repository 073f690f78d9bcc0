"""The two places that pages of state can be in, for a GPU and for a CPU."""

import torch
from torch import Tensor

from halfbyte.device import available_bytes


class CudaPool:
    """Device memory and pinned host memory, with a stream for each direction.

    Args:
        device: The GPU.
    """

    is_apart = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._in = torch.cuda.Stream(device)
        self._out = torch.cuda.Stream(device)
        self._events: dict[int, torch.cuda.Event] = {}

    def on_device(self, nbytes: int) -> Tensor:
        """Return uint8 `[nbytes]` on the GPU."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def on_host(self, nbytes: int) -> Tensor:
        """Return uint8 `[nbytes]` in pinned memory; pageable where no more can be pinned."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # copies then wait for the host, and are right all the same
            return torch.empty(nbytes, dtype=torch.uint8)

    def free_bytes(self) -> int:
        """Return what the driver has left, within what the process may take."""
        return available_bytes(self.device) or 0

    def fetch(self, page: Tensor, slot: Tensor) -> None:
        """Queue a copy to the GPU, behind the slot's last use and behind what was stored."""
        self._in.wait_stream(torch.cuda.current_stream(self.device))
        self._in.wait_stream(self._out)
        with torch.cuda.stream(self._in):
            slot[: page.numel()].copy_(page, non_blocking=True)
            self._events[slot.data_ptr()] = self._in.record_event()

    def arrived(self, slot: Tensor) -> None:
        """Let the current stream wait for the slot's copy."""
        torch.cuda.current_stream(self.device).wait_event(self._events.pop(slot.data_ptr()))

    def store(self, slot: Tensor, page: Tensor) -> None:
        """Queue a copy to the host, behind the current stream."""
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            page.copy_(slot[: page.numel()], non_blocking=True)

    def finish(self) -> None:
        """Let the current stream wait for both directions, so that slots can be used again."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._in)
        current.wait_stream(self._out)
        self._events.clear()

    def synchronize(self) -> None:
        """Wait for both directions."""
        self._in.synchronize()
        self._out.synchronize()


class CpuPool:
    """One memory that is device and host: pages never need to leave it."""

    is_apart = False

    def on_device(self, nbytes: int) -> Tensor:
        """Return uint8 `[nbytes]`."""
        return torch.empty(nbytes, dtype=torch.uint8)

    on_host = on_device

    def free_bytes(self) -> int:
        """Return 0: there is no room to move into."""
        return 0

    def fetch(self, page: Tensor, slot: Tensor) -> None:
        """Copy at once."""
        slot[: page.numel()].copy_(page)

    def arrived(self, slot: Tensor) -> None:
        """Nothing is on its way."""

    def store(self, slot: Tensor, page: Tensor) -> None:
        """Copy at once."""
        page.copy_(slot[: page.numel()])

    def finish(self) -> None:
        """Nothing is on its way."""

    def synchronize(self) -> None:
        """Nothing is on its way."""


def pool_for(device: torch.device) -> CudaPool | CpuPool:
    """Return where pages of a device's state can be."""
    return CudaPool(device) if device.type == "cuda" else CpuPool()
