"""What left comes back when there was room for long enough, and waits longer each time."""

from halfbyte.memory.patience import Patience


def steps_until_back(patience, free_bytes=100):
    for step in range(1, 1000):
        if patience.after_step(free_bytes):
            return step
    return None


def test_the_least_that_was_free_in_all_steps_may_come_back():
    patience = Patience()
    patience.left()
    found = [patience.after_step(free) for free in (90, 70, 80, 30, 60, 90, 90, 90)]
    assert found == [0] * 7 + [30]


def test_a_step_without_room_begins_the_wait_anew():
    patience = Patience()
    patience.left()
    assert [patience.after_step(free) for free in (9, 9, 9, -5, 9, 9, 9, 9)] == [0] * 8
    assert steps_until_back(patience) == 8


def test_each_departure_doubles_the_wait():
    patience = Patience()
    waits = []
    for _ in range(4):
        patience.left()
        waits.append(steps_until_back(patience))
    assert waits == [8, 16, 32, 64]
