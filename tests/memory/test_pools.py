"""Pages on a real device."""

import pytest
import torch

from halfbyte.memory.pager import Pager
from halfbyte.memory.pages import Field, Paging
from halfbyte.memory.pools import CpuPool, pool_for

FIELDS = (Field("moment", torch.float32),)


def test_a_cpu_is_device_and_host_in_one():
    pool = pool_for(torch.device("cpu"))
    assert isinstance(pool, CpuPool)
    slot, page = pool.on_device(8), torch.arange(8, dtype=torch.uint8)
    pool.fetch(page, slot)
    assert torch.equal(slot, page)
    pool.store(slot.add_(1), page)
    assert page.tolist() == list(range(1, 9))


@pytest.mark.gpu
def test_streamed_pages_equal_resident_ones():
    device = torch.device("cuda")
    numel = 256 * 4096

    def update(start, stop, state):
        state["moment"].mul_(1.5).add_(torch.arange(start, stop, device=device))

    pagers = [
        Pager(numel, FIELDS, pool_for(device), paging=Paging(2**16, resident_bytes=limit))
        for limit in (None, 2**21, 0)
    ]
    whole, _, away = pagers
    for step in range(8):
        for pager in pagers:
            if step % 2:
                pager.prefetch()
            pager.visit(update)
            pager.settle()
        if step == 3:
            assert whole.evict(1) == 4 * numel
            pagers[1].evict(2**20)
        if step == 5:
            whole.place("device")
    first, *others = (pager.read("moment", 0, numel).cpu() for pager in pagers)
    assert all(torch.equal(first, other) for other in others)
    assert (whole.host_bytes, away.resident_bytes) == (0, 0)
