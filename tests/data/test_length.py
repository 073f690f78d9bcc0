import numpy as np
import pytest

from halfbyte.data.length import apply_policy
from halfbyte.data.rows import TokenRows
from halfbyte.errors import DataError


@pytest.fixture
def rows():
    """Rows of 4, 10 and 7 tokens; all but the first two of each are learned."""
    lengths = np.array([4, 10, 7])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(offsets[-1], dtype=np.int32)
    labels = ids.copy()
    for start in offsets[:-1]:
        labels[start : start + 2] = -100
    return TokenRows(ids, labels, offsets, np.arange(3), np.zeros(3, dtype=np.int64))


def apply(rows, policy, max_length):
    return apply_policy(rows, policy, max_length, title="train.jsonl")


@pytest.mark.parametrize("policy", ["error", "truncate", "split", "drop"])
def test_rows_that_fit_are_left_alone(rows, policy):
    kept, counts = apply(rows, policy, 10)
    assert kept is rows
    assert counts.over_length_rows == 0


def test_error_has_the_numbers_and_the_way_out(rows):
    with pytest.raises(DataError) as error:
        apply(rows, "error", 5)
    assert "2 of 3 rows of train.jsonl are longer than max_length=5" in error.value.message
    assert "the longest has 10 tokens (row 2)" in error.value.message
    assert "lose 7 of 21 tokens, 7 of 15 learned tokens" in error.value.message
    assert "the stop token of 2 rows" in error.value.message
    assert "10 (keeps" in error.value.hint
    assert "truncate, split or drop" in error.value.hint


def test_truncate_counts_what_it_cuts(rows):
    kept, counts = apply(rows, "truncate", 5)
    assert kept.lengths.tolist() == [4, 5, 5]
    assert kept.input_ids.tolist() == [*range(4), *range(4, 9), *range(14, 19)]
    assert (counts.over_length_rows, counts.dropped_rows) == (2, 0)
    assert (counts.lost_tokens, counts.lost_supervised_tokens, counts.lost_stops) == (7, 7, 2)


def test_drop_counts_what_it_drops(rows):
    kept, counts = apply(rows, "drop", 5)
    assert kept.input_ids.tolist() == [0, 1, 2, 3]
    assert (counts.over_length_rows, counts.dropped_rows) == (2, 2)
    assert (counts.lost_tokens, counts.lost_supervised_tokens, counts.lost_stops) == (17, 13, 0)


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 6, 9])
def test_split_keeps_every_learned_token_learned_once(rows, max_length):
    kept, counts = apply(rows, "split", max_length)
    assert kept.lengths.max() <= max_length
    assert kept.lengths.min() >= 2
    learned = kept.labels[kept.labels != -100]
    assert sorted(learned.tolist()) == sorted(rows.labels[rows.labels != -100].tolist())
    assert counts.lost_tokens == 0


def test_a_stop_token_before_the_cut_is_not_lost(rows):
    labels = rows.labels.copy()
    labels[4 + 3 :][:6] = -100  # of the row of 10, only the third token is learned
    short = TokenRows(rows.input_ids, labels, rows.offsets, rows.source, rows.notes)
    assert apply(short, "truncate", 7)[1].lost_stops == int(labels[13] != -100)
