"""What pages of state are made of, where they can be, and who moves them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

PAGE_BYTES = 16 * 2**20
"""A copy of this size runs at the full speed of the bus."""
BLOCK_SIZE = 256
"""Page bounds are multiples of this many elements, so that no block of 8-bit state is cut."""

Placement = Literal["device", "auto", "host"]
"""Where state is: it never leaves the device; it does while there is no room; it is on the device
for its update only."""


@dataclass(frozen=True)
class Field:
    """One tensor of the state.

    Args:
        name: What it is called.
        dtype: Of its elements.
        span: Parameters that one element stands for: 1, or a block's 256 for its scale.
    """

    name: str
    dtype: torch.dtype
    span: int = 1

    def nbytes(self, numel: int) -> int:
        """Return its bytes for `numel` parameters, a multiple of the block."""
        return numel // self.span * self.dtype.itemsize


class Pool(Protocol):
    """Where pages can be, and how they move. Copies are queued; nothing waits for them but
    `arrived` (the device) and `synchronize` (the host).

    Attributes:
        is_apart: Whether device and host are two memories, so that leaving one makes room.
    """

    is_apart: bool

    def on_device(self, nbytes: int) -> Tensor:
        """Return uint8 `[nbytes]` on the device; raises torch.OutOfMemoryError."""

    def on_host(self, nbytes: int) -> Tensor:
        """Return uint8 `[nbytes]` in host memory that the device can copy from."""

    def free_bytes(self) -> int:
        """Return the bytes of the device that this process never took so far."""

    def fetch(self, page: Tensor, slot: Tensor) -> None:
        """Copy a page from the host to the front of a slot, after everything queued so far."""

    def arrived(self, slot: Tensor) -> None:
        """Let what is queued from now on wait for the slot's page."""

    def store(self, slot: Tensor, page: Tensor) -> None:
        """Copy the front of a slot back to its page, after what is queued so far."""

    def finish(self) -> None:
        """Let what is queued from now on wait for all copies; the slots may then be freed."""

    def synchronize(self) -> None:
        """Wait until the host sees all copies."""


@dataclass(frozen=True)
class Paging:
    """How state is cut into pages, and what memory these are made of.

    Args:
        page_bytes: Size of a page that can move.
        resident_bytes: Most bytes of pages on the device; None means what fits.
        pool: With what memory pages are made; None means that of the parameters' device.
    """

    page_bytes: int = PAGE_BYTES
    resident_bytes: int | None = None
    pool: Pool | None = None


@dataclass(eq=False)
class Page:
    """The state of parameters `start` to `stop`, field behind field in one buffer.

    Args:
        start: First parameter.
        stop: One past the last.
        buffer: uint8, on the device or on the host.
        is_resident: Which of both.
    """

    start: int
    stop: int
    buffer: Tensor
    is_resident: bool

    def views(self, fields: Sequence[Field], buffer: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors by field, here or in another buffer that the page was copied to."""
        buffer = self.buffer if buffer is None else buffer
        found, at = {}, 0
        for field in fields:
            end = at + field.nbytes(self.stop - self.start)
            found[field.name] = buffer[at:end].view(field.dtype)
            at = end
        return found

    def part(self, fields: Sequence[Field], start: int, stop: int) -> dict[str, Tensor]:
        """Return the tensors by field of those of its parameters from `start` to `stop`."""
        first, last = max(start, self.start) - self.start, min(stop, self.stop) - self.start
        views = self.views(fields)
        return {f.name: views[f.name][first // f.span : last // f.span] for f in fields}
