import re

import pytest
import torch
from transformers import LlamaConfig

from halfbyte import LoraConfig, NF4Config
from halfbyte.device import ALLOCATOR_VARIABLES
from halfbyte.memory.shortage import Shortage
from halfbyte.plan import explain
from halfbyte.plan.blueprint import blueprint
from halfbyte.plan.explain import by_owner, does_not_fit, gib
from halfbyte.plan.predict import Planner, Setting

GIB = 2**30
CARD = int(7.99 * GIB)  # 8 GB, as the driver leaves it


@pytest.fixture(scope="module")
def small_model(config_folder):
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=8192, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder = config_folder(config)
    return blueprint(folder, quant=NF4Config(), lora=LoraConfig(r=16), dtype=torch.bfloat16)


def shortage(**settings):
    return Shortage(
        torch.device("cuda"),
        "CUDA out of memory",
        **{
            "allocated_bytes": 7 * GIB, "cached_bytes": 2**28, "free_bytes": 2**27,
            "total_bytes": CARD, **settings,
        },
    )  # fmt: skip


def test_the_error_names_owners_free_bytes_and_three_changes(llama_8b_model):
    error = does_not_fit(shortage(), llama_8b_model, Setting(length=65536, total_bytes=CARD))
    for part in ("1 x 65,536 tokens", "4-bit codes 3.25 GiB", "128 MiB are free", "7.99 GiB on"):
        assert part in error.message
    found = error.hint.split("; or ")
    assert len(found) == 3
    assert found[0].startswith("max_length: ")
    assert all(re.search(r"\(peak [67]\.\d\d GiB\)|a card of (?!8 )", text) for text in found)


def test_where_others_use_the_card_the_changes_fit_beside_them(small_model):
    setting = Setting(length=65536, memory="lean", total_bytes=CARD)
    assert Planner(small_model).predict(setting).fits
    squeezed = shortage(allocated_bytes=GIB // 2, cached_bytes=0)  # others use the rest of it
    hint = does_not_fit(squeezed, small_model, setting).hint
    first, second, *_ = hint.split("; or ")
    assert first.startswith("end what else uses the GPU (6.")
    assert re.match(r"max_length: \d+ \(peak 0\.6\d GiB\)", second)
    assert "a card of 8 GB" not in hint


def test_where_only_pieces_were_too_small_they_are_to_be_joined(small_model, monkeypatch):
    monkeypatch.setattr(explain, "can_join_memory", lambda: True)
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    setting = Setting(length=16384, memory="lean", total_bytes=CARD)
    in_pieces = shortage(allocated_bytes=4 * GIB, cached_bytes=3 * GIB, free_bytes=GIB // 4)
    first, *_ = does_not_fit(in_pieces, small_model, setting).hint.split("; or ")
    assert first.startswith("set PYTORCH_ALLOC_CONF=expandable_segments:True")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    hint = does_not_fit(in_pieces, small_model, setting).hint
    assert hint.startswith("set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "PYTORCH" not in does_not_fit(in_pieces, small_model, setting).hint
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(explain, "can_join_memory", lambda: False)
    assert "PYTORCH" not in does_not_fit(in_pieces, small_model, setting).hint
    monkeypatch.setattr(explain, "can_join_memory", lambda: True)
    whole = shortage(allocated_bytes=7 * GIB, cached_bytes=0, free_bytes=GIB // 4)
    assert "PYTORCH" not in does_not_fit(whole, small_model, setting).hint


def test_on_a_cpu_the_allocator_is_quoted(llama_8b_model):
    error = does_not_fit(Shortage(torch.device("cpu"), "no room"), llama_8b_model, Setting())
    assert "no room" in error.message
    assert "max_length" in error.hint


def test_bytes_are_readable():
    assert gib(GIB) == "1.00 GiB"
    assert gib(2**20) == "1 MiB"
    assert by_owner({"a": 1, "b": 3 * GIB, "c": 0}) == "b 3.00 GiB, a 0 MiB"
