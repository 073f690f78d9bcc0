import torch

from halfbyte.memory.shortage import Shortage
from halfbyte.plan.explain import by_owner, does_not_fit, gib
from halfbyte.plan.predict import Setting

GIB = 2**30


def test_the_error_names_owners_free_bytes_and_changes(llama_8b_model):
    shortage = Shortage(
        torch.device("cuda"), "CUDA out of memory", allocated_bytes=7 * GIB, cached_bytes=2**28,
        free_bytes=2**27, total_bytes=8 * GIB,
    )  # fmt: skip
    setting = Setting(length=16384, total_bytes=8 * GIB)
    error = does_not_fit(shortage, llama_8b_model, setting)
    for part in ("1 x 16,384 tokens", "4-bit codes 3.25 GiB", "128 MiB are free", "8.00 GiB on"):
        assert part in error.message
    assert error.hint.startswith("max_length: ")
    assert "a card of 16 GB" in error.hint


def test_on_a_cpu_the_allocator_is_quoted(llama_8b_model):
    error = does_not_fit(Shortage(torch.device("cpu"), "no room"), llama_8b_model, Setting())
    assert "no room" in error.message
    assert "max_length" in error.hint


def test_bytes_are_readable():
    assert gib(GIB) == "1.00 GiB"
    assert gib(2**20) == "1 MiB"
    assert by_owner({"a": 1, "b": 3 * GIB, "c": 0}) == "b 3.00 GiB, a 0 MiB"
