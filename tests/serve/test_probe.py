"""A model that says something else in a batch than alone is not served."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.errors import ConfigError
from halfbyte.serve.forward import BatchedModel
from halfbyte.serve.probe import SMALLEST_LENGTH, check_model


@pytest.fixture
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_plain_model_passes(model, num_rows):
    check_model(model, BatchedModel(model, num_rows=num_rows, num_tokens=SMALLEST_LENGTH))


def test_a_mask_that_is_wrong_is_found(model, monkeypatch):
    batched = BatchedModel(model, num_rows=2, num_tokens=32)
    seen_all = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    monkeypatch.setattr(batched, "_masks", lambda where, width: seen_all.expand(2, 1, 1, width))
    with pytest.raises(ConfigError, match="the same logits in a batch as alone"):
        check_model(model, batched)
