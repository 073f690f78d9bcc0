"""Rows are written where they belong, read as far as they go, and moved whole."""

import torch
from transformers import DynamicCache

from halfbyte.serve.cache import SlotCache


def prompt_cache(num_layers, batch, tokens):
    cache = DynamicCache()
    for layer in range(num_layers):
        keys = torch.randn(batch, 2, tokens, 4)
        cache.update(keys, -keys, layer)
    return cache


def test_rows_join_grow_and_move():
    slots = SlotCache(num_layers=2, num_rows=3, num_tokens=8)
    assert slots.nbytes == 0
    prompts = prompt_cache(2, 2, 5)
    slots.join(0, prompts, source=1, num_tokens=3)
    slots.join(1, prompts, source=0, num_tokens=5)
    assert slots.nbytes == 2 * 2 * 3 * 2 * 8 * 4 * 4

    slots.begin_step(torch.tensor([3, 5]), width=6)
    new = torch.randn(2, 2, 1, 4)
    keys, values = slots.update(new, -new, 1)
    assert keys.shape == (2, 2, 6, 4)
    theirs = prompts.layers[1].keys
    assert torch.equal(keys[0, :, :3], theirs[1, :, :3])
    assert torch.equal(keys[0, :, 3], new[0, :, 0])
    assert torch.equal(keys[1, :, :5], theirs[0])
    assert torch.equal(keys[1, :, 5], new[1, :, 0])
    assert torch.equal(values, -keys)

    slots.move(1, 0, num_tokens=6)
    slots.begin_step(torch.tensor([6]), width=7)
    keys, _ = slots.update(new[:1], -new[:1], 1)
    assert torch.equal(keys[0, :, :5], theirs[0])
    assert torch.equal(keys[0, :, 5], new[1, :, 0])


def test_transformers_is_told_how_much_is_there():
    slots = SlotCache(num_layers=1, num_rows=2, num_tokens=8)
    slots.begin_step(torch.tensor([4, 2]), width=5)
    layer = slots.layers[0]
    assert layer.get_seq_length() == 4
    assert layer.get_mask_sizes(1) == (5, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == 8
