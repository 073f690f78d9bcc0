"""Each row gets the update of its own slot, and slot 0 changes nothing."""

import torch
from torch import nn

from halfbyte.serve.layer import BatchedLoraLinear, Selection


def make(selection):
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    layer = BatchedLoraLinear(
        base, selection, 6, 5, device=torch.device("cpu"), dtype=torch.float32
    )
    pairs = {
        1: (torch.randn(2, 6), torch.randn(5, 2), 0.5),
        2: (torch.randn(4, 6), torch.randn(5, 4), 2.0),
    }
    layer.resize(3, 4)
    for slot, pair in pairs.items():
        layer.put(slot, *pair)
    return base, layer, pairs


def test_rows_get_their_own_adapter():
    selection = Selection()
    base, layer, pairs = make(selection)
    x = torch.randn(4, 3, 6)
    selection.slots = torch.tensor([2, 0, 1, 2])
    y = layer(x)
    for row, slot in enumerate(selection.slots.tolist()):
        expected = base(x[row])
        if slot:
            A, B, scaling = pairs[slot]
            expected = expected + scaling * x[row] @ A.T @ B.T
        torch.testing.assert_close(y[row], expected)
    assert torch.equal(y[1], base(x)[1])


def test_flat_inputs_are_rows_of_tokens():
    selection = Selection()
    _, layer, _ = make(selection)
    x = torch.randn(2, 3, 6)
    selection.slots = torch.tensor([1, 2])
    torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))


def test_without_adapters_it_is_the_base():
    selection = Selection()
    base, layer, _ = make(selection)
    x = torch.randn(2, 3, 6)
    assert torch.equal(layer(x), base(x))


def test_what_is_held_stays_when_room_is_made_and_a_slot_can_be_cleared():
    selection = Selection()
    base, layer, _ = make(selection)
    x = torch.randn(2, 3, 6)
    selection.slots = torch.tensor([1, 2])
    before = layer(x)
    layer.resize(8, 16)
    torch.testing.assert_close(layer(x), before)
    layer.clear(2)
    assert torch.equal(layer(x)[1], base(x)[1])
    torch.testing.assert_close(layer(x)[0], before[0])
