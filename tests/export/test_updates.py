"""Each kind of update, against its formula in float64."""

import math

import pytest
import torch

from halfbyte.errors import AdapterError
from halfbyte.export.updates import (
    BiasUpdate,
    EmbeddingUpdate,
    LoraUpdate,
    ReplaceUpdate,
    RowsUpdate,
)

OUT, IN, RANK, VOCAB = 6, 5, 2, 7


def apply(update, tensor, load, height=2):
    """Apply an update as a merge does: its shapes are checked first, then slab after slab."""
    shape = update.check(tuple(tensor.shape), load)
    grown = torch.zeros(shape)
    grown[: len(tensor)] = tensor[: shape[0]]
    slabs = [slice(start, min(start + height, shape[0])) for start in range(0, shape[0], height)]
    return torch.cat([update.apply(grown[rows], rows, load) for rows in slabs])


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    shapes = {
        "A": (RANK, IN),
        "B": (OUT, RANK),
        "magnitude": (OUT,),
        "embedding_A": (RANK, VOCAB),
        "embedding_B": (IN, RANK),
        "bias": (OUT,),
        "rows": (2, IN),
        "copy": (VOCAB + 3, IN),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_lora(tensors):
    weight = torch.randn(OUT, IN)
    expected = weight.double() + 0.5 * tensors["B"].double() @ tensors["A"].double()
    found = apply(LoraUpdate("A", "B", RANK, 0.5), weight, tensors.get)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_dora_gives_every_row_its_trained_length(tensors):
    update = LoraUpdate("A", "B", RANK, 0.5, magnitude="magnitude")
    merged = apply(update, torch.randn(OUT, IN), tensors.get)
    torch.testing.assert_close(merged.norm(dim=1), tensors["magnitude"].abs())


def test_embedding(tensors):
    table = torch.randn(VOCAB, IN)
    found = apply(EmbeddingUpdate("embedding_A", "embedding_B", RANK, 2.0), table, tensors.get)
    expected = table + 2.0 * (tensors["embedding_B"] @ tensors["embedding_A"]).T
    torch.testing.assert_close(found, expected)


def test_bias_is_scaled_too(tensors):
    bias = torch.randn(OUT)
    found = apply(BiasUpdate("bias", 0.5), bias, tensors.get)
    torch.testing.assert_close(found, bias + 0.5 * tensors["bias"])


def test_rows_take_their_places_and_the_rest_stays(tensors):
    table = torch.randn(VOCAB, IN)
    found = apply(RowsUpdate("rows", (4, 1)), table, tensors.get)
    assert torch.equal(found[[4, 1]], tensors["rows"])
    others = [0, 2, 3, 5, 6]
    assert torch.equal(found[others], table[others])


def test_rows_of_new_tokens_are_added(tensors):
    table = torch.randn(VOCAB - 1, IN)
    found = apply(RowsUpdate("rows", (VOCAB - 1, 1)), table, tensors.get)
    assert torch.equal(found[[VOCAB - 1, 1]], tensors["rows"])
    assert torch.equal(found[2 : VOCAB - 1], table[2:])


def test_copies_may_have_more_rows_but_no_other_width(tensors):
    update = ReplaceUpdate("copy")
    assert torch.equal(apply(update, torch.zeros(VOCAB, IN), tensors.get), tensors["copy"])
    with pytest.raises(AdapterError, match="copy should be"):
        apply(update, torch.zeros(VOCAB, IN + 1), tensors.get)


@pytest.mark.parametrize(
    ("update", "shape", "message"),
    [
        (LoraUpdate("A", "B", RANK, 1.0), (OUT, IN + 1), "A should be"),
        (LoraUpdate("A", "B", RANK, 1.0), (OUT + 1, IN), "B should be"),
        (LoraUpdate("A", "B", RANK + 1, 1.0), (OUT, IN), "A should be"),
        (LoraUpdate("A", "B", RANK, 1.0), (OUT, IN, 1), "merging is for matrices"),
        (LoraUpdate("A", "B", RANK, 1.0, magnitude="bias"), (OUT, IN), None),
        (BiasUpdate("bias", 1.0), (OUT + 1,), "bias should be"),
        (RowsUpdate("rows", (1,)), (VOCAB, IN), "rows should be"),
        (RowsUpdate("rows", (1, VOCAB + 1)), (VOCAB, IN), f"trains token {VOCAB + 1}"),
    ],
)
def test_what_does_not_fit_is_refused(tensors, update, shape, message):
    weight = torch.ones(math.prod(shape)).view(shape)
    if message is None:
        apply(update, weight, tensors.get)
        return
    with pytest.raises(AdapterError, match=message):
        apply(update, weight, tensors.get)
