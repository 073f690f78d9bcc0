"""Pages come and go, and the state is what it would be if they had stayed."""

import pytest
import torch

from halfbyte.memory.pager import UNPAGED, Field, Pager, Paging
from halfbyte.memory.pools import CpuPool

FIELDS = (Field("moment", torch.float32), Field("scale", torch.float32, 256))
NUMEL = 256 * 20
PER_BLOCK = 4 * 256 + 4
PAGE = Paging(page_bytes=3 * PER_BLOCK)  # 7 pages, the last of 2 blocks


def add_positions(start, stop, state):
    state["moment"].add_(torch.arange(start, stop, dtype=torch.float32))
    state["scale"].add_(start)


def contents(pager):
    return {f.name: pager.read(f.name, 0, NUMEL).clone() for f in FIELDS}


def expected(rounds):
    pager = Pager(NUMEL, FIELDS, CpuPool(), PAGE)
    for _ in range(rounds):
        pager.visit(add_positions)
    return contents(pager)


@pytest.mark.parametrize("resident_pages", [0, 1, 3, 7])
def test_state_does_not_depend_on_where_pages_are(resident_pages, fake_pool):
    pool = fake_pool(capacity=(resident_pages + 2) * 3 * PER_BLOCK)
    paging = Paging(PAGE.page_bytes, resident_bytes=resident_pages * 3 * PER_BLOCK)
    pager = Pager(NUMEL, FIELDS, pool, paging)
    for _ in range(3):
        pager.visit(add_positions)
    assert pager.resident_bytes + pager.host_bytes == 20 * PER_BLOCK
    assert pager.resident_bytes <= resident_pages * 3 * PER_BLOCK
    for name, value in expected(3).items():
        assert torch.equal(contents(pager)[name], value), name


def test_pages_go_to_the_host_when_the_device_is_full_and_never_ask_for_more(fake_pool):
    pool = fake_pool(capacity=4 * 3 * PER_BLOCK)
    pager = Pager(NUMEL, FIELDS, pool, PAGE)
    assert pager.resident_bytes == 4 * 3 * PER_BLOCK == pool.used
    pager.visit(add_positions)  # two pages make room for slots
    assert pager.resident_bytes == 2 * 3 * PER_BLOCK == pool.used
    assert pager.evict(1) == 3 * PER_BLOCK
    pager.visit(add_positions)
    assert pager.evict(10**9) > 0
    pool.capacity = 3 * PER_BLOCK
    pager.visit(add_positions)  # one slot is enough
    pool.capacity = 0
    with pytest.raises(torch.OutOfMemoryError):
        pager.visit(add_positions)
    assert (pager.resident_bytes, pool.used) == (0, 0)
    assert torch.equal(contents(pager)["moment"], expected(3)["moment"])


def test_copies_in_and_out_alternate_over_two_slots(fake_pool):
    pool = fake_pool(capacity=2 * 3 * PER_BLOCK)
    pager = Pager(NUMEL, FIELDS, pool, Paging(PAGE.page_bytes, resident_bytes=0))
    pager.visit(add_positions)
    assert pool.moved == ["in", "in", *["out", "in"] * 5, "out", "out"]


def test_a_failed_visit_goes_on_where_it_stopped(fake_pool):
    pool = fake_pool(capacity=4 * 3 * PER_BLOCK)
    pager = Pager(NUMEL, FIELDS, pool, Paging(PAGE.page_bytes, resident_bytes=2 * 3 * PER_BLOCK))
    failures = [1, 4, 5]

    def sometimes(start, stop, state):
        if failures and start == failures[0] * 3 * 256:
            failures.pop(0)
            raise torch.OutOfMemoryError("injected")
        add_positions(start, stop, state)

    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            pager.visit(sometimes)
    pager.visit(sometimes)
    pager.visit(sometimes)
    assert torch.equal(contents(pager)["moment"], expected(2)["moment"])


def test_what_was_read_can_be_written_into_other_pages(fake_pool):
    pager = Pager(NUMEL, FIELDS, fake_pool(10**6), PAGE)
    pager.visit(add_positions)
    other = Pager(NUMEL, FIELDS, fake_pool(0), Paging(5 * PER_BLOCK, resident_bytes=0))
    for field in FIELDS:
        other.write(field.name, 0, pager.read(field.name, 0, NUMEL))
    for name, value in contents(pager).items():
        assert torch.equal(contents(other)[name], value)
    part = pager.read("moment", 256, 512)
    assert torch.equal(part, torch.arange(256.0, 512.0))


def test_one_page_is_as_large_as_the_state_and_is_not_cut():
    pager = Pager(NUMEL, FIELDS, CpuPool(), UNPAGED)
    calls = []
    pager.visit(lambda start, stop, state: calls.append((start, stop)))
    assert calls == [(0, NUMEL)]
    assert pager.evict(1) == 0  # on a CPU there is nowhere else to go
