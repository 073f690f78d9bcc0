"""Optimizer state in pages: on the device while there is room, in pinned host memory when not.

A page holds everything that the state knows of one range of elements, in one buffer, so it moves in
one copy. `visit` hands the pages to an update one after the other. Those that are away come through
two slots on the device:

    in        fetch 3 ──────► slot A          fetch 5 ──► A
    update              2 (in B)   3 (in A)   4 (in B)   5 (in A)
    out                            store 2    store 3

Copies run beside the update of another page. What is computed does not depend on where a page is,
so paged and unpaged state are equal bit for bit (QLoRA, arXiv 2305.14314, section 3: paged
optimizers; there pages are moved by CUDA's unified memory, here by copies).
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PAGE_BYTES = 32 * 2**20
"""A copy of this size runs at the full speed of the bus, and two slots of it are cheap."""
BLOCK_SIZE = 256
"""Page bounds are multiples of this many elements, so that no block of 8-bit state is cut."""
_SLOTS = 2

Update = Callable[[int, int, dict[str, Tensor]], None]


@dataclass(frozen=True)
class Field:
    """One tensor of the state.

    Args:
        name: What `visit`, `read` and `write` call it.
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
        is_apart: Whether device and host are two memories, so that eviction makes room.
    """

    is_apart: bool

    def on_device(self, nbytes: int) -> Tensor:
        """Return uint8 `[nbytes]` on the device; raises torch.OutOfMemoryError."""

    def on_host(self, nbytes: int) -> Tensor:
        """Return uint8 `[nbytes]` in host memory that the device can copy from."""

    def fetch(self, page: Tensor, slot: Tensor) -> None:
        """Copy a page from the host into a slot, after everything queued so far."""

    def arrived(self, slot: Tensor) -> None:
        """Let what is queued from now on wait for the slot's page."""

    def store(self, slot: Tensor, page: Tensor) -> None:
        """Copy a slot back to its page, after what is queued so far."""

    def finish(self) -> None:
        """Let what is queued from now on wait for all copies; the slots may then be freed."""

    def synchronize(self) -> None:
        """Wait until the host sees all copies."""


@dataclass(frozen=True)
class Paging:
    """How state is cut into pages and where these may be.

    Args:
        page_bytes: Size of a page; None makes a single one, which must fit on the device.
        resident_bytes: Most bytes of pages on the device; None means what fits.
        pool: With what memory pages are made; None means that of the parameters' device.
    """

    page_bytes: int | None = PAGE_BYTES
    resident_bytes: int | None = None
    pool: Pool | None = None


UNPAGED = Paging(page_bytes=None)


@dataclass
class _Page:
    start: int
    stop: int
    buffer: Tensor
    is_resident: bool


class Pager:
    """The state of `numel` parameters, zero at first, in pages.

    Args:
        numel: Parameters, a multiple of `BLOCK_SIZE`.
        fields: The tensors of the state.
        pool: Where pages can be.
        paging: Size of pages, and how many may be on the device.
    """

    def __init__(self, numel: int, fields: Sequence[Field], pool: Pool, paging: Paging) -> None:
        self.fields = tuple(fields)
        self.pool = pool
        self._done = 0
        self._pages: list[_Page] = []
        per_block = sum(field.nbytes(BLOCK_SIZE) for field in fields)
        if paging.page_bytes is None:
            whole = pool.on_device(numel // BLOCK_SIZE * per_block).zero_()
            self._pages.append(_Page(0, numel, whole, is_resident=True))
            return
        size = max(paging.page_bytes // per_block, 1) * BLOCK_SIZE
        left = sys.maxsize if paging.resident_bytes is None else paging.resident_bytes
        for start in range(0, numel, size):
            stop = min(start + size, numel)
            nbytes = (stop - start) // BLOCK_SIZE * per_block
            buffer = self._try_device(nbytes) if nbytes <= left else None
            left = 0 if buffer is None else left - nbytes
            is_resident = buffer is not None
            page = pool.on_host(nbytes) if buffer is None else buffer
            self._pages.append(_Page(start, stop, page.zero_(), is_resident))

    @property
    def resident_bytes(self) -> int:
        """Bytes of pages on the device."""
        return sum(page.buffer.nbytes for page in self._pages if page.is_resident)

    @property
    def host_bytes(self) -> int:
        """Bytes of pages in host memory."""
        return sum(page.buffer.nbytes for page in self._pages if not page.is_resident)

    def evict(self, nbytes: int) -> int:
        """Move pages to the host until `nbytes` of the device are free; return how many became so.

        The last pages go first: their way back is hidden behind the updates of those before them.
        """
        freed = 0
        for page in reversed(self._pages if self.pool.is_apart else ()):
            if freed >= nbytes:
                break
            if page.is_resident:
                away = self.pool.on_host(page.buffer.nbytes)
                self.pool.store(page.buffer, away)
                self.pool.finish()
                page.buffer, page.is_resident = away, False
                freed += away.nbytes
        self.pool.synchronize()
        return freed

    def visit(self, update: Update) -> None:
        """Call `update(start, stop, tensors by field)` for every page, in order.

        If a call fails, the pages before it are done, and the next `visit` goes on with that one.

        Raises:
            torch.OutOfMemoryError: not even one slot fits, with all pages away.
        """
        slots = self._slots()
        away = deque(page for page in self._pages[self._done :] if not page.is_resident)
        arriving: deque[Tensor] = deque()

        def fetch(slot: Tensor) -> None:
            if away:
                self.pool.fetch(away.popleft().buffer, slot)
                arriving.append(slot)

        for slot in slots:
            fetch(slot)
        try:
            while self._done < len(self._pages):
                page = self._pages[self._done]
                if page.is_resident:
                    update(page.start, page.stop, self._views(page, page.buffer))
                else:
                    slot = arriving.popleft()
                    self.pool.arrived(slot)
                    update(page.start, page.stop, self._views(page, slot))
                    self.pool.store(slot, page.buffer)
                    fetch(slot)
                self._done += 1
        finally:
            if slots:
                self.pool.finish()
        self._done = 0

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a field's part for parameters `start` to `stop`, multiples of its span.

        A view where it lies in one page, wherever that is; else a copy on the host.
        """
        self.pool.synchronize()
        parts = self._parts(name, start, stop)
        return parts[0] if len(parts) == 1 else torch.cat([part.cpu() for part in parts])

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Set a field's part from parameter `start` on to `values`; pages stay where they are."""
        field = next(field for field in self.fields if field.name == name)
        self.pool.synchronize()
        at = 0
        for part in self._parts(name, start, start + values.numel() * field.span):
            part.copy_(values[at : at + part.numel()])
            at += part.numel()

    def _parts(self, name: str, start: int, stop: int) -> list[Tensor]:
        span = next(field.span for field in self.fields if field.name == name)
        parts = []
        for page in self._pages:
            first, last = max(start, page.start), min(stop, page.stop)
            if first < last:
                view = self._views(page, page.buffer)[name]
                parts.append(view[(first - page.start) // span : (last - page.start) // span])
        return parts

    def _views(self, page: _Page, buffer: Tensor) -> dict[str, Tensor]:
        views, at = {}, 0
        for field in self.fields:
            end = at + field.nbytes(page.stop - page.start)
            views[field.name] = buffer[at:end].view(field.dtype)
            at = end
        return views

    def _slots(self) -> list[Tensor]:
        """Return room on the device for two pages, or for one; pages leave where none fits."""
        away = [page.buffer.nbytes for page in self._pages[self._done :] if not page.is_resident]
        slots: list[Tensor] = []
        while len(slots) < min(_SLOTS, len(away)):
            slot = self._try_device(max(away))
            if slot is not None:
                slots.append(slot)
            elif slots:
                break
            elif not self.evict(_SLOTS * max(away)):
                slots.append(self.pool.on_device(max(away)))
        return slots

    def _try_device(self, nbytes: int) -> Tensor | None:
        try:
            return self.pool.on_device(nbytes)
        except torch.OutOfMemoryError:
            return None
