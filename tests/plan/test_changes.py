"""What is offered to change is little, and enough."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig

from halfbyte import LoraConfig, NF4Config
from halfbyte.plan.blueprint import blueprint
from halfbyte.plan.cards import usable_bytes
from halfbyte.plan.changes import changes
from halfbyte.plan.predict import Planner, Setting
from halfbyte.plan.smaller import rank_of, smaller_adapters

GIB = 2**30
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, vocab_size=128256, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)  # fmt: skip

SMALL = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=4, vocab_size=32000, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)  # fmt: skip

NEOX = GPTNeoXConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    vocab_size=1024, dtype="bfloat16", architectures=["GPTNeoXForCausalLM"],
)  # fmt: skip


def settings_of(text):
    """Return a change's settings by name."""
    return dict(re.findall(r"(\w+): (\S+)", text)) | (
        {"card": found[1]} if (found := re.search(r"a card of (\d+) GB", text)) else {}
    )


def peak_with(model, setting, change):
    """Plan the step anew as a user would who sets what the change says."""
    said = settings_of(change.text)
    setting = replace(
        setting,
        length=int(said.get("max_length", setting.length)),
        rows=int(said.get("per_device_train_batch_size", setting.rows)),
        memory=said.get("memory", setting.memory),
        state_bits=8 if "8bit" in said.get("optim", "") else setting.state_bits,
        is_paged=setting.is_paged or "paged" in said.get("optim", ""),
        total_bytes=int(said["card"]) * GIB if "card" in said else setting.total_bytes,
    )
    rank = rank_of(model)
    targets = re.search(r"target_modules: \[(.*?)\]", change.text)
    targets = targets and targets[1].split(", ")
    with smaller_adapters(model, divisor=rank // int(said.get("r", rank)), targets=targets):
        prediction = Planner(model).predict(setting)
    assert prediction.fits
    assert prediction.peak.nbytes <= usable_bytes(setting.total_bytes)
    return prediction.peak.nbytes


def check(planner, setting, count=3):
    prediction = planner.predict(setting)
    assert not prediction.fits
    found = changes(planner, prediction)
    assert len({change.text for change in found}) == count
    for change in found:
        assert peak_with(planner.model, setting, change) == change.peak_bytes
    return [change.text for change in found]


@pytest.fixture(scope="module")
def small_planner(config_folder):
    return all_linear(config_folder(SMALL), r=64)


def all_linear(folder, r):
    lora = LoraConfig(r=r, target_modules="all-linear")
    return Planner(blueprint(folder, quant=NF4Config(), lora=lora, dtype=torch.bfloat16))


def card_for(planner, setting, length):
    """Return the setting on a card that has room for rows of `length` tokens at most."""
    least = replace(setting, rows=1, length=length, memory="lean", is_paged=True, total_bytes=1)
    peak = planner.predict(least).peak.nbytes
    return replace(setting, total_bytes=GIB // 2 + int(1.04 * peak))


def test_three_changes_each_of_which_is_enough(small_planner):
    setting = card_for(small_planner, Setting(length=32768, memory="lean"), 4096)
    texts = check(small_planner, setting)
    assert texts[0].startswith("max_length: ")
    assert "max_length: " in texts[1]  # longer rows for a smaller rank
    lengths = [int(settings_of(text)["max_length"]) for text in texts[:2]]
    assert lengths[1] >= 1.15 * lengths[0]


def test_what_changes_no_result_comes_first(small_planner):
    setting = Setting(rows=4, length=4096, memory="fast", is_paged=False)
    texts = check(small_planner, card_for(small_planner, setting, 32768))
    assert texts[0] == "memory: lean"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("r", "length", "first"), [(16, 32768, "max_length: "), (256, 2048, "r: ")]
)
def test_llama_8b_on_8_gib(r, length, first, llama_8b):
    setting = Setting(length=length, memory="lean", total_bytes=8 * GIB)
    assert check(all_linear(llama_8b, r), setting)[0].startswith(first)


@pytest.mark.slow
def test_where_only_a_larger_card_helps_nothing_else_is_offered(config_folder):
    planner = all_linear(config_folder(LLAMA_70B), r=64)
    setting = Setting(length=2048, memory="lean", total_bytes=24 * GIB)
    (text,) = check(planner, setting, count=1)
    assert text == "a card of 48 GB"


def test_layers_of_transformers_can_be_computed_twice(config_folder):
    planner = all_linear(config_folder(NEOX), r=8)
    assert planner.why_unfused is not None
    setting = Setting(rows=4, length=2048)
    twice = planner.predict(replace(setting, is_checkpointed=True)).peak.nbytes
    setting = replace(setting, total_bytes=GIB // 2 + int(1.05 * twice))
    prediction = planner.predict(setting)
    assert not prediction.fits
    assert changes(planner, prediction, count=1)[0].text == "gradient_checkpointing: true"


def test_without_a_card_nothing_needs_to_change(llama_planner):
    assert changes(llama_planner, llama_planner.predict(Setting(memory="lean"))) == []
