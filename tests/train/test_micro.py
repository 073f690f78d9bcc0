"""Micro-steps cut smaller lose no token, no label and no place."""

import dataclasses

import pytest
import torch

from halfbyte.engine.body import FusedBody
from halfbyte.train.loss import LanguageModel
from halfbyte.train.micro import cut, num_positions


@pytest.fixture
def fused(make_lora):
    parts = LanguageModel.of(make_lora())
    return dataclasses.replace(parts, body=FusedBody(parts.body, memory="fast"))


def real_tokens(batch):
    real = slice(None) if batch.attention_mask is None else batch.attention_mask.bool()
    return batch.input_ids[real].flatten().tolist()


def flat(pieces):
    return [token for piece in pieces for batch in piece.batches for token in real_tokens(batch)]


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_hold_every_token_in_order_and_know_where_they_begin(fused, batch_of, packed):
    batches = [batch_of([9, 5, 7], packed=packed), batch_of([4, 12], seed=1, packed=packed)]
    whole = cut(fused, batches)
    assert [(piece.index, piece.first_token) for piece in whole] == [(0, 0)]
    pieces = cut(fused, batches, max_tokens=12)
    assert flat(pieces) == flat(whole)
    assert [piece.num_tokens for piece in pieces] == [9, 12, 4, 12]
    assert [piece.first_token for piece in pieces] == [0, 9, 21, 25]
    assert {piece.index for piece in pieces} == {0}
    supervised = [batch.num_supervised for piece in pieces for batch in piece.batches]
    assert sum(supervised) == sum(batch.num_supervised for batch in batches)


def test_a_document_is_never_cut(fused, batch_of):
    pieces = cut(fused, [batch_of([9, 30, 7], packed=True)], max_tokens=8)
    assert [piece.num_tokens for piece in pieces] == [9, 30, 7]


def test_without_packing_each_piece_is_one_batch(make_lora, batch_of):
    batches = [batch_of([9, 5, 7, 3])]
    pieces = cut(LanguageModel.of(make_lora()), batches, max_tokens=11)
    assert [len(piece.batches) for piece in pieces] == [1] * len(pieces)
    assert [piece.batches[0].input_ids.shape for piece in pieces] == [(1, 9), (1, 5), (2, 7)]
    assert flat(pieces) == real_tokens(batches[0])


def test_pieces_keep_the_numbers_of_their_rows(fused, batch_of):
    batch = dataclasses.replace(batch_of([9, 5, 7]), rows=(4, 8, 6))
    pieces = cut(fused, [batch], max_tokens=10)
    assert [b.rows for piece in pieces for b in piece.batches] == [(4,), (8,), (6,)]


def test_filling_of_a_packed_row_counts(batch_of):
    assert num_positions(batch_of([9, 5], packed=True)) == 14
    assert num_positions(batch_of([9, 5])) == 14


def test_the_first_token_of_a_piece_is_no_target(fused, batch_of):
    batch = batch_of([6, 6], packed=True, prompt=0)
    batch.labels[:] = batch.input_ids
    pieces = cut(fused, [batch], max_tokens=6)
    labels = torch.cat([piece.batches[0].labels[:, 0] for piece in pieces])
    assert labels.tolist()[1] == -100
