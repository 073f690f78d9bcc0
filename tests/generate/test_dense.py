"""Dense weights on a CPU: the same answers, within memory, and nothing left behind."""

import peft
import pytest
import torch

from halfbyte.device import available_bytes
from halfbyte.generate.dense import dense_weights
from halfbyte.models.load import load
from halfbyte.quant.linear import NF4Linear


@pytest.fixture
def model(tiny_base):
    return load(tiny_base, device="cpu")[0]


def packed(model):
    return [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]


@torch.no_grad()
def test_logits_are_the_same_bit_for_bit_and_the_layers_come_back(model):
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    ids = torch.arange(9)[None]
    before, names = adapted(ids).logits, packed(adapted)
    assert names
    with dense_weights(adapted) as is_dense:
        assert is_dense
        assert packed(adapted) == []
        assert torch.equal(adapted(ids).logits, before)
        with dense_weights(adapted) as again:
            assert not again
    assert packed(adapted) == names


def test_what_does_not_fit_stays_in_four_bits(model):
    names = packed(model)
    with dense_weights(model, limit_bytes=10) as is_dense:
        assert not is_dense
        assert packed(model) == names


def test_layers_come_back_after_an_error(model):
    names = packed(model)
    with pytest.raises(KeyboardInterrupt), dense_weights(model):
        raise KeyboardInterrupt
    assert packed(model) == names


def test_memory_is_known_on_linux():
    assert available_bytes("cpu") > 2**20
