"""Optimizer state in pages: on the device while there is room, in pinned host memory when not.

Where there is room, the state is one page, and an update is one launch over it. When it has to
leave it is cut into many, and each moves in one copy. `visit` hands the pages to an update one
after the other. Those that are away come through a few slots on the device:

    in        fetch 3 ──────► slot A          fetch 5 ──► A
    update              2 (in B)   3 (in A)   4 (in B)   5 (in A)
    out                            store 2    store 3

Copies in both directions run beside the update of another page, and `prefetch` starts the first of
them before it is time for the update. What is computed does not depend on where a page is, so state
on the device, on the host or in between is equal bit for bit (QLoRA, arXiv 2305.14314, section 3:
paged optimizers; there pages are moved by CUDA's unified memory, here by copies).
"""

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.memory.pages import BLOCK_SIZE, Field, Page, Paging, Placement, Pool
from halfbyte.memory.patience import Patience

SLOTS = 4
"""One is filled, one updated, one emptied; the fourth takes up what these differ in."""
_MARGIN = 8
"""Pages that must fit on the device beside those that come back."""

Update = Callable[[int, int, dict[str, Tensor]], None]
Copy = Callable[[Tensor, Tensor], None]


@dataclass
class _Flight:
    """Pages on their way through slots: those that wait, and where the others arrive, in order."""

    slots: list[Tensor]
    waiting: deque[Page]
    arriving: deque[Tensor]


class Pager:
    """The state of `numel` parameters, zero at first, in pages.

    Args:
        numel: Parameters, a multiple of `BLOCK_SIZE`.
        fields: The tensors of the state.
        pool: Where pages can be. Where it is one memory, they are on the device.
        placement: Where they shall be.
        paging: Size of pages, and how many may be on the device.

    Raises:
        torch.OutOfMemoryError: "device", and there is no room.
    """

    def __init__(
        self,
        numel: int,
        fields: Sequence[Field],
        pool: Pool,
        placement: Placement = "auto",
        paging: Paging | None = None,
    ) -> None:
        paging = paging or Paging()
        self.fields = tuple(fields)
        self.pool = pool
        self.placement: Placement = placement if pool.is_apart else "device"
        self._numel = numel
        self._page_numel = max(paging.page_bytes // self._nbytes(BLOCK_SIZE), 1) * BLOCK_SIZE
        limit = paging.resident_bytes
        self._limit = sys.maxsize if limit is None else limit
        self._patience = Patience()
        self.has_come_back = False  # pages are on the device that were away
        self._flight: _Flight | None = None
        self._next = 0  # where a visit that failed goes on
        self._pages = self._new_pages()
        for page in self._pages:
            page.buffer.zero_()

    @property
    def resident_bytes(self) -> int:
        """Bytes of pages on the device."""
        return sum(page.buffer.nbytes for page in self._pages if page.is_resident)

    @property
    def host_bytes(self) -> int:
        """Bytes of pages in host memory."""
        return sum(page.buffer.nbytes for page in self._pages if not page.is_resident)

    def place(self, placement: Placement) -> None:
        """Change where pages shall be; they move at once where they must.

        Raises:
            torch.OutOfMemoryError: "device", and there is no room; pages are as with "auto" then.
        """
        if not self.pool.is_apart:
            return
        self.placement = "auto"
        if placement == "host":
            self.evict(self.resident_bytes)
        elif placement == "device" and self.host_bytes:
            self._gather(self.pool.on_device(self._nbytes(self._numel)))
        self.placement = placement

    def evict(self, nbytes: int) -> int:
        """Move pages to the host until `nbytes` of the device are free; return how many became so.

        The last pages go first: their way back is hidden behind the updates of those before them.
        State that is one page leaves as a whole.
        """
        self.land()
        freed = 0
        for page in self._pages[::-1] if self.placement != "device" else ():
            if freed < nbytes and page.is_resident:
                self._send_away(page)
                freed += page.buffer.nbytes
        if freed:
            self.pool.synchronize()
            self._patience.left()
            self.has_come_back = False
        return freed

    def prefetch(self) -> None:
        """Let the first pages that are away come to the device, as far as slots fit there now.

        The slots take memory until the next `visit` ends, or until `land`.
        """
        if self._flight is None and (slots := self._free_slots()):
            self._flight = self._take_off(slots)

    def land(self) -> None:
        """Free the slots; a page that came and was not updated is on the host as it was."""
        if self._flight is not None and self._flight.slots:
            self.pool.finish()
        self._flight = None

    def visit(self, update: Update) -> None:
        """Call `update(start, stop, tensors by field)` for every page, in order.

        If a call fails, the pages before it are done, and the next `visit` goes on with that one.

        Raises:
            torch.OutOfMemoryError: not even one slot fits, with all pages away.
        """
        flight = self._flight = self._flight or self._take_off(self._slots())
        try:
            for page in self._pages:
                if page.start < self._next:
                    continue
                if page.is_resident:
                    update(page.start, page.stop, page.views(self.fields))
                else:
                    slot = flight.arriving.popleft()
                    self.pool.arrived(slot)
                    update(page.start, page.stop, page.views(self.fields, slot))
                    self.pool.store(slot, page.buffer)
                    self._fetch(flight, slot)
                self._next = page.stop
        finally:
            self.land()
        self._next = 0

    def settle(self) -> None:
        """Bring pages back that had room in each of the last steps; to be called after a step."""
        if self.placement != "auto" or not self.host_bytes:
            return
        free = self.pool.free_bytes() - _MARGIN * self._nbytes(self._page_numel)
        room = self._patience.after_step(min(free, self._limit - self.resident_bytes))
        if not room:
            return
        if room >= self.host_bytes:
            whole = self._try_device(self._nbytes(self._numel))
            if whole is not None:
                self._gather(whole)
                self.has_come_back = True
                return
        for page in self._away():
            room -= page.buffer.nbytes
            buffer = self._try_device(page.buffer.nbytes) if room >= 0 else None
            if buffer is None:
                break
            self.pool.fetch(page.buffer, buffer)
            page.buffer, page.is_resident = buffer, True
            self.has_come_back = True
        self.pool.finish()

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
        self.land()
        self.pool.synchronize()
        at = 0
        for part in self._parts(name, start, start + values.numel() * field.span):
            part.copy_(values[at : at + part.numel()])
            at += part.numel()

    def _nbytes(self, numel: int) -> int:
        return sum(field.nbytes(numel) for field in self.fields)

    def _new_pages(self) -> list[Page]:
        """Return one page on the device, or many that are where there is room."""
        whole = self._nbytes(self._numel)
        if self.placement == "device":
            return [Page(0, self._numel, self.pool.on_device(whole), is_resident=True)]
        left = self._limit if self.placement == "auto" else 0
        if whole <= left and (buffer := self._try_device(whole)) is not None:
            return [Page(0, self._numel, buffer, is_resident=True)]
        pages = []
        for start, stop in self._bounds(0, self._numel):
            nbytes = self._nbytes(stop - start)
            found = self._try_device(nbytes) if nbytes <= left else None
            left = 0 if found is None else left - nbytes
            buffer = self.pool.on_host(nbytes) if found is None else found
            pages.append(Page(start, stop, buffer, is_resident=found is not None))
        return pages

    def _bounds(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return itertools.pairwise([*range(start, stop, self._page_numel), stop])

    def _away(self) -> list[Page]:
        """Return the pages on the host that the visit has not reached yet."""
        return [page for page in self._pages if not page.is_resident and page.start >= self._next]

    def _send_away(self, page: Page) -> None:
        """Put pages on the host in the place of one on the device."""
        parts = [
            Page(start, stop, self.pool.on_host(self._nbytes(stop - start)), is_resident=False)
            for start, stop in self._bounds(page.start, page.stop)
        ]
        for part in parts:
            self._copy(page, part, self.pool.store)
        self.pool.finish()
        at = self._pages.index(page)
        self._pages[at : at + 1] = parts

    def _gather(self, buffer: Tensor) -> None:
        """Put one page on the device in the place of all."""
        whole = Page(0, self._numel, buffer, is_resident=True)
        for page in self._pages:
            self._copy(page, whole, self.pool.fetch)
        self.pool.finish()
        self._pages = [whole]

    def _copy(self, source: Page, target: Page, copy: Copy) -> None:
        """Copy what two pages share, field by field."""
        bounds = max(source.start, target.start), min(source.stop, target.stop)
        parts = source.part(self.fields, *bounds), target.part(self.fields, *bounds)
        for field in self.fields:
            copy(parts[0][field.name], parts[1][field.name])

    def _parts(self, name: str, start: int, stop: int) -> list[Tensor]:
        return [
            page.part(self.fields, start, stop)[name]
            for page in self._pages
            if page.start < stop and start < page.stop
        ]

    def _slots(self) -> list[Tensor]:
        """Return room on the device for pages on their way; pages leave where there is none."""
        slots = self._free_slots()
        if slots or not (away := self._away()):
            return slots
        size = max(page.buffer.nbytes for page in away)
        self.evict(SLOTS * size)
        return self._free_slots() or [self.pool.on_device(size)]

    def _free_slots(self) -> list[Tensor]:
        away = [page.buffer.nbytes for page in self._away()]
        slots: list[Tensor] = []
        while len(slots) < min(SLOTS, len(away)):
            slot = self._try_device(max(away))
            if slot is None:
                break
            slots.append(slot)
        return slots

    def _take_off(self, slots: list[Tensor]) -> _Flight:
        flight = _Flight(slots, deque(self._away()), deque())
        for slot in slots:
            self._fetch(flight, slot)
        return flight

    def _fetch(self, flight: _Flight, slot: Tensor) -> None:
        if flight.waiting:
            self.pool.fetch(flight.waiting.popleft().buffer, slot)
            flight.arriving.append(slot)

    def _try_device(self, nbytes: int) -> Tensor | None:
        try:
            return self.pool.on_device(nbytes)
        except torch.OutOfMemoryError:
            return None
