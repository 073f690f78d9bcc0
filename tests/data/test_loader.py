import datasets
import numpy as np
import pytest
import torch
import transformers

from halfbyte.data.loader import BatchPlan, eval_batches, row_lengths
from halfbyte.errors import DataError


def rows_of(lengths, seed=0):
    """Rows of random tokens from 1 to 99, the second half of each learned."""
    random = np.random.default_rng(seed)
    ids = [random.integers(1, 100, n).tolist() for n in lengths]
    labels = [[-100] * ((len(row) + 1) // 2) + row[(len(row) + 1) // 2 :] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def plan_of(rows, **settings):
    defaults = {
        "batch_size": 2,
        "gradient_accumulation_steps": 3,
        "packing": False,
        "max_length": 16,
        "seed": 1,
        "pad_token_id": 0,
    }
    return BatchPlan(rows, **{**defaults, **settings})


def documents(batch):
    """Return the documents of a batch as (ids, labels), told by positions."""
    found = []
    for row in range(batch.input_ids.shape[0]):
        starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], batch.input_ids.shape[1]], strict=True):
            ids = batch.input_ids[row, start:end]
            if batch.attention_mask is not None:
                ids = ids[batch.attention_mask[row, start:end] == 1]
            elif int(ids[0]) == 0:  # padding of a packed row: no real token is 0 here
                continue
            found.append((ids.tolist(), batch.labels[row, start : start + len(ids)].tolist()))
    return found


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_has_every_row_once(packing, shuffle):
    rows = rows_of([3, 9, 16, 2, 5, 8, 8, 1, 12, 4, 7, 6, 3])
    plan = plan_of(rows, packing=packing, shuffle=shuffle)
    for epoch in (0, 1):
        seen = [
            document
            for index in range(len(plan))
            for batch in plan.step(epoch, index)
            for document in documents(batch)
        ]
        expected = list(zip(rows["input_ids"], rows["labels"], strict=True))
        assert sorted(seen) == sorted((list(a), list(b)) for a, b in expected)
        if not packing and not shuffle:
            assert [ids for ids, _ in seen] == list(rows["input_ids"])


def test_a_step_is_a_pure_function():
    rows = rows_of(range(1, 15))
    forwards, backwards = plan_of(rows, packing=True), plan_of(rows, packing=True)
    places = [(epoch, index) for epoch in (0, 1, 2) for index in range(len(forwards))]
    first = {place: forwards.step(*place) for place in places}
    for place in reversed(places):
        for ours, theirs in zip(backwards.step(*place), first[place], strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)
            assert torch.equal(ours.labels, theirs.labels)
    epochs = [[b.input_ids.tolist() for b in first[epoch, 0]] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]


def test_steps_are_counted_as_the_trainer_does():
    plan = plan_of(rows_of([3] * 13))
    assert len(plan) == 3  # 6 rows, 6 rows, 1 row
    assert [batch.input_ids.shape[0] for batch in plan.step(0, 0)] == [2, 2, 2]
    assert [batch.input_ids.shape[0] for batch in plan.step(0, 2)] == [1]
    with pytest.raises(IndexError, match="step 3 of an epoch with 3"):
        plan.step(0, 3)


def test_padding_is_told_by_length_and_not_by_id():
    # Token 2 is both a real token and the padding.
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[5, 2, 2], [2]], "labels": [[-100, 2, 2], [-100]]}
    )
    (batch,) = plan_of(rows, pad_token_id=2, shuffle=False).step(0, 0)
    assert batch.input_ids.tolist() == [[5, 2, 2], [2, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[-100, 2, 2], [-100, -100, -100]]
    assert (batch.num_supervised, batch.num_tokens) == (2, 4)


def test_no_mask_where_nothing_is_padded():
    (batch,) = plan_of(rows_of([4, 4]), pad_token_id=None).step(0, 0)
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_tokens_are_those_that_the_shifted_loss_sees(packing):
    rows = rows_of([3, 9, 16, 2, 5, 8])
    total = sum(batch.num_supervised for batch in plan_of(rows, packing=packing).step(0, 0))
    assert total == sum(label != -100 for row in rows["labels"] for label in row[1:])
    # A first label that is learned can be predicted by nothing, packed or not.
    learned = rows.map(lambda row: {"labels": row["input_ids"]})
    total = sum(batch.num_supervised for batch in plan_of(learned, packing=packing).step(0, 0))
    assert total == sum(len(row) - 1 for row in rows["input_ids"])


def test_a_batch_moves():
    (batch, *_) = plan_of(rows_of([3, 4])).step(0, 0)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.attention_mask.device.type == "meta"
    assert moved.num_supervised == batch.num_supervised


def test_eval_batches_keep_the_order():
    rows = rows_of([3, 9, 2, 5, 5])
    batches = list(eval_batches(rows, 2, None))
    assert [batch.input_ids.shape for batch in batches] == [(2, 9), (2, 5), (1, 5)]
    seen = [ids for batch in batches for ids, _ in documents(batch)]
    assert seen == list(rows["input_ids"])


def test_lengths():
    rows = rows_of([3, 9, 2])
    assert row_lengths(rows).tolist() == [3, 9, 2]
    assert row_lengths(rows.select([2, 0])).tolist() == [2, 3]


def test_nothing_and_too_much_are_refused():
    with pytest.raises(DataError, match="no rows"):
        plan_of(rows_of([]))
    with pytest.raises(DataError, match="a row has 17 tokens, a packed sequence 16"):
        plan_of(rows_of([17]), packing=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_give_the_logits_that_they_give_alone(attention):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        attn_implementation=attention,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    rows = rows_of([5, 7, 3, 9, 2, 11])
    plan = plan_of(rows, packing=True, gradient_accumulation_steps=1)
    for index in range(len(plan)):
        (batch,) = plan.step(0, index)
        with torch.no_grad():
            # With a cache, transformers does not look for packed documents.
            packed = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for row in range(len(batch.input_ids)):
            starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], len(batch.input_ids[row])], strict=True):
                with torch.no_grad():
                    alone = model(batch.input_ids[row : row + 1, start:end]).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone, atol=1e-5, rtol=1e-4)


def test_digest_is_that_of_the_order():
    rows = rows_of([3, 9, 4, 2, 5])
    digests = {
        plan_of(rows, **settings).digest()
        for settings in ({}, {"seed": 2}, {"shuffle": False}, {"packing": True})
    }
    assert len(digests) == 4
    plan = plan_of(rows)
    plan.step(3, 0)  # wherever it was asked from
    assert plan.digest() in digests


def test_a_batch_knows_its_rows():
    rows = rows_of([3, 9, 4, 2, 5])
    plan = plan_of(rows, packing=True)
    batches = plan.step(0, 0)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(5))
    numbered = rows.add_column("source", [70, 71, 72, 73, 74])
    first = next(eval_batches(numbered, 2, 0))
    assert first.rows == (70, 71)
    assert first.to("cpu").rows == (70, 71)
