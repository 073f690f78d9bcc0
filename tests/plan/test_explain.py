import re

import torch

from halfbyte.memory.shortage import Shortage
from halfbyte.plan.explain import by_owner, does_not_fit, gib
from halfbyte.plan.predict import Setting

GIB = 2**30
CARD = int(7.99 * GIB)  # 8 GB, as the driver leaves it


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


def test_where_others_use_the_card_the_changes_fit_beside_them(llama_8b_model):
    squeezed = shortage(allocated_bytes=6 * GIB)  # the step would have fitted the whole card
    hint = does_not_fit(squeezed, llama_8b_model, Setting(length=16384, total_bytes=CARD)).hint
    assert re.match(r"max_length: \d+ \(peak [56]\.\d\d GiB\)", hint)
    assert "a card of 8 GB" not in hint


def test_on_a_cpu_the_allocator_is_quoted(llama_8b_model):
    error = does_not_fit(Shortage(torch.device("cpu"), "no room"), llama_8b_model, Setting())
    assert "no room" in error.message
    assert "max_length" in error.hint


def test_bytes_are_readable():
    assert gib(GIB) == "1.00 GiB"
    assert gib(2**20) == "1 MiB"
    assert by_owner({"a": 1, "b": 3 * GIB, "c": 0}) == "b 3.00 GiB, a 0 MiB"
