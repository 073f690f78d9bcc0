import torch

from halfbyte.data.loader import Batch
from halfbyte.engine.packed import ALIGNMENT, merge, pack


def _batch(rows, *, mask=True):
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    keep = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.where(keep == 1, ids, -100)
    tokens = int(keep.sum())
    return Batch(
        ids,
        labels,
        torch.arange(length).expand(len(rows), length),
        keep if mask else None,
        tokens - len(rows),
        tokens,
    )


def test_the_drawing():
    packed = pack([_batch([[1, 2, 3], [4, 5, 6, 7]]), _batch([[8, 9]])])
    assert packed.input_ids[0, :9].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert packed.input_ids.shape == (1, ALIGNMENT)
    assert packed.layout.cu_seqlens.tolist() == [0, 3, 7, 9, ALIGNMENT]
    assert packed.layout.max_length == ALIGNMENT - 9
    assert packed.position_ids[0, :9].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert packed.rows.tolist() == [0, 1, 3, 4, 5, 7]
    assert packed.labels.tolist() == [2, 3, 5, 6, 7, 9]


def test_whole_rows_stay_a_dense_batch():
    packed = pack([_batch([[1, 2, 3], [4, 5, 6]])])
    assert packed.input_ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert packed.layout.cu_seqlens is None
    assert packed.rows.tolist() == [0, 1, 3, 4]
    assert packed.labels.tolist() == [2, 3, 5, 6]


def test_documents_packed_before_keep_their_bounds():
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    labels = torch.tensor([[-100, 2, 3, -100, 5]])
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = pack([Batch(ids, labels, positions, None, 3, 5)])
    assert packed.layout.cu_seqlens.tolist()[:3] == [0, 3, 5]
    assert packed.rows.tolist() == [0, 1, 3]
    assert packed.labels.tolist() == [2, 3, 5]


def test_micro_batches_merge_up_to_a_number_of_tokens():
    batches = [_batch([[1] * n]) for n in (5, 5, 5, 20, 1)]
    assert [[b.num_tokens for b in group] for group in merge(batches, 10)] == [
        [5, 5],
        [5],
        [20],
        [1],
    ]
    assert [len(group) for group in merge(batches, 1000)] == [5]
