"""How much memory a process uses now: on its device, and of the host."""

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.device import peak_bytes, peak_rss_bytes

_STATUS = Path("/proc/self/statm")


@dataclass(frozen=True)
class Usage:
    """Bytes in use.

    Attributes:
        allocated_bytes: In tensors on the device; of a CPU, all that the process uses.
        reserved_bytes: What the allocator holds for tensors; of a CPU, the same.
        peak_bytes: The most that was allocated.
        host_bytes: Main memory of the process.
    """

    allocated_bytes: int
    reserved_bytes: int
    peak_bytes: int
    host_bytes: int

    @classmethod
    def measure(cls, device: torch.device) -> "Usage":
        """Look at the device, without waiting for it."""
        host = _resident_bytes()
        if device.type != "cuda":
            return cls(host, host, peak_bytes(device), host)
        found = torch.cuda.memory_stats(device)  # once: each of torch's short forms asks for all
        allocated, reserved = (f"{kind}_bytes.all" for kind in ("allocated", "reserved"))
        return cls(
            found.get(f"{allocated}.current", 0),
            found.get(f"{reserved}.current", 0),
            found.get(f"{allocated}.peak", 0),
            host,
        )


def _resident_bytes() -> int:
    """Return the resident set now, or where the system does not tell, the largest so far."""
    try:
        pages = int(_STATUS.read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_rss_bytes()
    return pages * resource.getpagesize()
