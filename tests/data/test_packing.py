import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import packing
from halfbyte.data.loader import make_batch
from halfbyte.data.packing import pack, shuffled


def drawing():
    """Return the rows of the drawing in the module's docstring, as lists by name."""
    lines = {}
    for line in packing.__doc__.splitlines():
        words = line.split()
        if len(words) == 17:
            lines[words[0]] = [words[1:9], words[9:17]]
    return lines


def drawn_attention():
    """Return the drawn mask of the second sequence: who sees whom."""
    lines = packing.__doc__.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == list("ccdd...."))
    return [
        [line[11 + 2 * column : 12 + 2 * column] == "x" for column in range(8)]
        for line in lines[head + 1 : head + 9]
    ]


def test_the_drawing_is_what_is_packed():
    lengths = np.array([5, 3, 2, 2])
    sequences = pack(lengths, 8, seed=0, epoch=0, shuffle=False)
    assert [rows.tolist() for rows in sequences] == [[0, 1], [2, 3]]

    drawn = drawing()
    # Tokens a, b, c, d are 1, 2, 3, 4; what the drawing does not learn, the rows do not teach.
    a_labels = [-100, 1, 1, 1, 1]
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": [[1] * 5, [2] * 3, [3] * 2, [4] * 2],
            "labels": [a_labels, [-100, 2, 2], [-100, 3], [-100, 4]],
        }
    ).with_format("numpy")
    batch = make_batch(rows, sequences, pad_token_id=0, packing=True)
    names = {0: ".", 1: "a", 2: "b", 3: "c", 4: "d", -100: "-"}
    ids, labels = (
        [[names[value] for value in row] for row in tensor.tolist()]
        for tensor in (batch.input_ids, batch.labels)
    )
    assert ids == drawn["input_ids"]
    assert labels == drawn["labels"]
    positions = [[str(value) for value in row] for row in batch.position_ids.tolist()]
    assert positions == drawn["position_ids"]
    assert batch.attention_mask is None

    document = np.cumsum(batch.position_ids.numpy()[1] == 0)
    causal = np.tri(8, dtype=bool)
    assert ((document[:, None] == document[None, :]) & causal).tolist() == drawn_attention()


def first_fit_one_by_one(lengths, capacity):
    room, bins = [], []
    for length in lengths:
        chosen = next((number for number, left in enumerate(room) if left >= length), None)
        if chosen is None:
            chosen = len(room)
            room.append(capacity)
        room[chosen] -= length
        bins.append(chosen)
    return bins


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_it_is_first_fit_decreasing(lengths, capacity):
    lengths = np.array(sorted(lengths, reverse=True))
    assert packing._first_fit(lengths, capacity).tolist() == first_fit_one_by_one(lengths, capacity)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 5), st.integers(0, 3))
def test_every_row_is_packed_once_and_fits(lengths, seed, epoch):
    lengths = np.array(lengths)
    sequences = pack(lengths, 25, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(sequences).tolist()) == list(range(len(lengths)))
    assert max(lengths[rows].sum() for rows in sequences) <= 25


def test_epochs_differ_in_order_but_not_in_number():
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    first, again, second = (pack(lengths, 256, seed=7, epoch=epoch) for epoch in (0, 0, 1))
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in again]
    assert [rows.tolist() for rows in first] != [rows.tolist() for rows in second]
    assert len(first) == len(second)
    assert lengths.sum() / (len(first) * 256) > 0.99


def test_rows_that_do_not_fit_are_our_own_mistake():
    with pytest.raises(ValueError, match="1 to 8 tokens, got 3 to 9"):
        pack(np.array([3, 9]), 8, seed=0, epoch=0)
    assert pack(np.array([], dtype=np.int64), 8, seed=0, epoch=0) == []


def test_shuffling_never_changes():
    # A resumed run depends on it: these numbers are for ever.
    assert shuffled(10, seed=42, epoch=0).tolist() == SHUFFLED_42_0
    assert shuffled(10, seed=42, epoch=1).tolist() != SHUFFLED_42_0
    assert shuffled(10, seed=43, epoch=0).tolist() != SHUFFLED_42_0
    assert shuffled(10, seed=42, epoch=0, stream=1).tolist() != SHUFFLED_42_0
    assert sorted(shuffled(1000, seed=-1, epoch=0).tolist()) == list(range(1000))


def test_shuffling_is_fair():
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), shuffled(6, seed=seed, epoch=0)] += 1
    assert abs(counts / 3000 - 1 / 6).max() < 0.03


SHUFFLED_42_0 = [3, 8, 4, 6, 2, 1, 5, 9, 0, 7]
