"""Pages come and go, and the state is what it would be if they had stayed."""

import pytest
import torch

from halfbyte.memory.pager import SLOTS, Pager
from halfbyte.memory.pages import Field, Paging
from halfbyte.memory.pools import CpuPool

FIELDS = (Field("moment", torch.float32), Field("scale", torch.float32, 256))
NUMEL = 256 * 20
PER_BLOCK = 4 * 256 + 4
PAGE = 3 * PER_BLOCK  # 7 pages, the last of 2 blocks
WHOLE = 20 * PER_BLOCK
PLENTY = 10**6


def make(pool, placement="auto", resident_bytes=None, page_bytes=PAGE):
    return Pager(NUMEL, FIELDS, pool, placement, Paging(page_bytes, resident_bytes))


def add_positions(start, stop, state):
    state["moment"].add_(torch.arange(start, stop, dtype=torch.float32))
    state["scale"].add_(torch.arange(start, stop, 256))


def contents(pager):
    return {f.name: pager.read(f.name, 0, NUMEL).clone() for f in FIELDS}


def is_right(pager, rounds):
    positions = torch.arange(NUMEL, dtype=torch.float32) * rounds
    found = contents(pager)
    return torch.equal(found["moment"], positions) and torch.equal(found["scale"], positions[::256])


class Calls(list):
    """Update as `add_positions` does, and note the ranges."""

    def __call__(self, start, stop, state):
        self.append((start, stop))
        add_positions(start, stop, state)


@pytest.mark.parametrize("resident_pages", [0, 1, 3, 7])
def test_state_does_not_depend_on_where_pages_are(resident_pages, fake_pool):
    pool = fake_pool(capacity=(resident_pages + SLOTS) * PAGE)
    pager = make(pool, resident_bytes=resident_pages * PAGE)
    for _ in range(3):
        pager.prefetch()
        pager.visit(add_positions)
        pager.settle()
    assert pager.resident_bytes + pager.host_bytes == WHOLE
    assert pager.resident_bytes <= resident_pages * PAGE
    assert is_right(pager, rounds=3)


def test_with_room_the_update_is_one_call_and_nothing_is_copied(fake_pool):
    for pool, placement in ((fake_pool(PLENTY), "auto"), (CpuPool(), "host")):
        pager, calls = make(pool, placement), Calls()
        pager.prefetch()
        pager.visit(calls)
        pager.settle()
        assert calls == [(0, NUMEL)]
        assert pager.resident_bytes == WHOLE
        assert getattr(pool, "moved", []) == []


def test_on_the_host_each_page_is_copied_once_each_way_beside_the_others(fake_pool):
    pool, calls = fake_pool(SLOTS * PAGE), Calls()
    pager = make(pool, "host")
    pager.visit(calls)
    assert [stop - start for start, stop in calls] == [768] * 6 + [512]
    ahead = ["in"] * SLOTS
    assert pool.moved == [*ahead, *["out", "in"] * (7 - SLOTS), *["out"] * SLOTS]
    assert (pager.resident_bytes, pager.host_bytes, pool.used) == (0, WHOLE, 0)
    assert is_right(pager, rounds=1)


def test_a_prefetch_begins_what_the_visit_goes_on_with(fake_pool):
    pool = fake_pool(2 * PAGE)
    pager = make(pool, "host")
    pager.prefetch()
    pager.prefetch()
    assert pool.moved == ["in"] * 2
    pager.visit(add_positions)
    assert pool.moved.count("in") == pool.moved.count("out") == 7
    assert pool.used == 0
    pager.prefetch()
    pager.land()  # the step was left out
    assert pool.used == 0
    pool.capacity = 0
    pager.prefetch()  # no room: the visit will make some
    pool.capacity = PAGE
    pager.visit(add_positions)
    assert is_right(pager, rounds=2)


def test_pages_go_to_the_host_when_the_device_is_full_and_never_ask_for_more(fake_pool):
    pool = fake_pool(capacity=5 * PAGE)
    pager = make(pool)
    assert pager.resident_bytes == 5 * PAGE == pool.used
    pager.visit(add_positions)  # pages make room for slots
    assert pager.resident_bytes == (5 - SLOTS) * PAGE == pool.used
    assert pager.evict(1) == PAGE
    pager.visit(add_positions)
    assert pager.evict(10**9) == 0
    pool.capacity = PAGE
    pager.visit(add_positions)  # one slot is enough
    pool.capacity = 0
    with pytest.raises(torch.OutOfMemoryError):
        pager.visit(add_positions)
    assert (pager.resident_bytes, pool.used) == (0, 0)
    assert is_right(pager, rounds=3)


def test_a_failed_visit_goes_on_where_it_stopped(fake_pool):
    pager = make(fake_pool(capacity=(2 + SLOTS) * PAGE), resident_bytes=2 * PAGE)
    failures = [1, 4, 5]

    def sometimes(start, stop, state):
        if failures and start == failures[0] * 3 * 256:
            failures.pop(0)
            raise torch.OutOfMemoryError("injected")
        add_positions(start, stop, state)

    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            pager.visit(sometimes)
        pager.evict(PAGE)
    pager.visit(sometimes)
    pager.visit(sometimes)
    assert is_right(pager, rounds=2)


def test_one_page_leaves_as_many_and_comes_back_as_one_after_steps_with_room(fake_pool):
    pool, calls = fake_pool(PLENTY), Calls()
    pager = make(pool)
    pager.visit(calls)
    assert pager.evict(1) == WHOLE == pager.host_bytes
    steps_away = []
    for _ in range(2):
        steps = 0
        while pager.host_bytes:
            pager.visit(calls)
            pager.settle()
            steps += 1
        steps_away.append(steps)
        assert pager.has_come_back
        calls.clear()
        pager.visit(calls)
        assert calls == [(0, NUMEL)]
        pager.evict(WHOLE)
    assert not pager.has_come_back
    assert steps_away == [8, 16]  # what had to leave again waits for longer
    assert is_right(pager, rounds=1 + 8 + 1 + 16 + 1)


def test_what_fits_comes_back_when_not_all_does_and_only_with_a_margin(fake_pool):
    pool = fake_pool(PLENTY)
    pager = make(pool)
    pager.evict(WHOLE)
    for capacity, resident in ((8 * PAGE + 100, 0), (10 * PAGE + 100, 2 * PAGE)):
        pool.capacity = capacity
        for _ in range(8):
            pager.visit(add_positions)
            pager.settle()
        assert pager.resident_bytes == resident
    assert is_right(pager, rounds=16)


def test_one_step_without_room_is_enough_to_stay_away(fake_pool):
    pool = fake_pool(PLENTY)
    pager = make(pool)
    pager.evict(WHOLE)
    for step in range(20):
        pool.capacity = SLOTS * PAGE if step % 7 == 0 else PLENTY
        pager.visit(add_positions)
        pager.settle()
    assert pager.resident_bytes == 0


def test_the_place_can_be_changed(fake_pool):
    pool = fake_pool(PLENTY)
    pager = make(pool, "device")
    assert pager.evict(WHOLE) == 0
    pager.place("host")
    for _ in range(20):
        pager.visit(add_positions)
        pager.settle()
    assert (pager.resident_bytes, pool.used) == (0, 0)  # it stays there, whatever is free
    pool.capacity = SLOTS * PAGE
    with pytest.raises(torch.OutOfMemoryError):
        pager.place("device")
    pool.capacity = PLENTY
    pager.place("device")
    assert pager.resident_bytes == WHOLE
    assert is_right(pager, rounds=20)


@pytest.mark.parametrize("source", ["device", "auto", "host"])
@pytest.mark.parametrize("target", ["device", "auto", "host"])
def test_what_was_read_can_be_written_into_other_pages(source, target, fake_pool):
    room = {"device": PLENTY, "auto": 6 * PAGE, "host": SLOTS * PAGE}
    pager = make(fake_pool(room[source]), source)
    pager.visit(add_positions)
    other = make(fake_pool(room[target]), target, page_bytes=5 * PER_BLOCK)
    other.prefetch()  # what came too early is not used
    for field in FIELDS:
        other.write(field.name, 0, pager.read(field.name, 0, NUMEL))
    assert is_right(other, rounds=1)
    for each in (pager, other):
        each.visit(add_positions)
        assert is_right(each, rounds=2)
    assert torch.equal(pager.read("moment", 256, 512), 2 * torch.arange(256.0, 512.0))
