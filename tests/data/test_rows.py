import numpy as np
import pytest

from halfbyte.data.rows import TokenRows

# Rows of 3, 1 and 4 tokens; the tokens 2, 3, 5 and 7 are learned.
IDS = [[1, 2, 3], [4], [5, 6, 7, 8]]
LEARNED = {2, 3, 5, 7}


@pytest.fixture
def rows():
    flat = np.array([token for row in IDS for token in row], dtype=np.int32)
    return TokenRows(
        flat,
        np.where(np.isin(flat, list(LEARNED)), flat, -100).astype(np.int32),
        np.array([0, 3, 4, 8]),
        np.array([0, 1, 1]),
        np.array([0, 1, 2]),
    )


def as_lists(rows):
    dataset = rows.to_dataset()
    return list(dataset["input_ids"]), list(dataset["labels"])


def test_counts_by_row(rows):
    assert len(rows) == 3
    assert rows.lengths.tolist() == [3, 1, 4]
    assert rows.supervised.tolist() == [2, 0, 2]
    assert rows.learned_lengths.tolist() == [3, 0, 3]


def test_select_keeps_rows_whole_but_first_labels_unlearned(rows):
    assert as_lists(rows.select(np.array([2, 0]))) == (
        [[5, 6, 7, 8], [1, 2, 3]],
        [[-100, -100, 7, -100], [-100, 2, 3]],
    )
    assert rows.select(np.array([False, True, False])).source.tolist() == [1]
    assert len(rows.select(np.zeros(3, dtype=bool))) == 0


def test_cut_takes_pieces_of_rows(rows):
    cut = rows.cut(np.array([0, 2, 2]), np.array([0, 4, 6]), np.array([2, 6, 8]))
    assert as_lists(cut) == ([[1, 2], [5, 6], [7, 8]], [[-100, 2], [-100, -100], [-100, -100]])
    assert cut.notes.tolist() == [0, 2, 2]


def test_keys_and_digest_tell_rows_apart(rows):
    keys = rows.keys()
    assert len(set(keys)) == 3
    assert rows.select(np.array([1])).keys() == [keys[1]]
    whole = rows.select(np.arange(3))
    assert whole.digest() == rows.select(np.arange(3)).digest()
    assert whole.digest() != rows.select(np.array([0, 2, 1])).digest()


def test_a_dataset_gives_the_rows_back(rows):
    dataset = rows.to_dataset().add_column("notes", [0, 1, 2])
    assert TokenRows.from_dataset(dataset).digest() == rows.digest()
    assert TokenRows.from_dataset(dataset.select([2, 1])).lengths.tolist() == [4, 1]
