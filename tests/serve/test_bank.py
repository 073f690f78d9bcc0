"""Adapters are read for what they are, refused where they do not fit, and put into slots."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.adapters.files import read_adapter_files
from halfbyte.errors import AdapterError
from halfbyte.serve.bank import AdapterBank, read_pairs


@pytest.fixture
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


def write(tiny_base, folder, **settings):
    """Save an adapter with peft itself, its B not zero."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    config = peft.LoraConfig(
        **{
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
            "init_lora_weights": False,
            **settings,
        }
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_with_peft(tiny_base, folder, ids):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).eval()(ids).logits


@torch.no_grad()
def test_a_batch_of_adapters_equals_peft_one_by_one(model, tiny_base, tmp_path):
    folders = [
        write(tiny_base, tmp_path / "plain"),
        write(
            tiny_base,
            tmp_path / "patterns",
            use_rslora=True,
            target_modules="all-linear",
            rank_pattern={"q_proj": 7},
            alpha_pattern={"down_proj": 3},
        ),
        write(tiny_base, tmp_path / "attention", r=2, target_modules=["k_proj", "o_proj"]),
    ]
    bank = AdapterBank(model)
    ids = torch.randint(0, 255, (4, 9))
    plain = model(ids).logits
    slots = []
    for folder in folders:
        pairs = read_pairs(read_adapter_files(folder))
        bank.check(pairs, folder)
        slots.append(bank.install(pairs))
    bank.select([slots[1], 0, slots[2], slots[0]])
    together = model(ids).logits
    torch.testing.assert_close(together[1], plain[1])
    for row, folder in ((0, folders[1]), (2, folders[2]), (3, folders[0])):
        expected = logits_with_peft(tiny_base, folder, ids)[row]
        torch.testing.assert_close(together[row], expected, atol=2e-4, rtol=1e-4)
        assert (together[row] - plain[row]).abs().max() > 0.1


@torch.no_grad()
def test_slots_are_used_again(model, tiny_base, tmp_path):
    pairs = read_pairs(read_adapter_files(write(tiny_base, tmp_path / "one")))
    bank = AdapterBank(model)
    ids = torch.randint(0, 255, (1, 5))
    plain = model(ids).logits
    slots = [bank.install(pairs) for _ in range(5)]
    assert len(set(slots)) == 5
    assert 0 not in slots
    bank.remove(slots[2])
    bank.select([slots[2]])
    torch.testing.assert_close(model(ids).logits, plain)
    assert bank.install(pairs) == slots[2]


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}],
    ids=lambda settings: next(iter(settings)),
)
def test_more_than_low_rank_updates_is_refused(tiny_base, tmp_path, settings):
    folder = write(tiny_base, tmp_path / "more", **settings)
    with pytest.raises(AdapterError, match="plain LoRA") as caught:
        read_pairs(read_adapter_files(folder))
    assert "halfbyte merge" in caught.value.hint


def test_layers_of_another_size_are_refused(model, make_base, tmp_path):
    other = make_base(hidden_size=32, num_hidden_layers=3)
    folder = write(other, tmp_path / "other")
    with pytest.raises(AdapterError, match="of 160 to 32 features; the model has one of 160 to 64"):
        AdapterBank(model).check(read_pairs(read_adapter_files(folder)), folder)


def test_layers_that_are_not_there_are_refused(model, make_base, tmp_path):
    deeper = make_base(num_hidden_layers=3)
    folder = write(deeper, tmp_path / "deeper")
    with pytest.raises(AdapterError, match=r"layers\.2.*no linear layer"):
        AdapterBank(model).check(read_pairs(read_adapter_files(folder)), folder)
