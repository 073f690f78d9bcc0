"""Onto which form of the base: measured where it can be, and always said why."""

import pytest

from halfbyte.errors import AdapterError
from halfbyte.export import measure
from halfbyte.export.choice import Choice, choose
from halfbyte.export.config import MergeConfig
from halfbyte.export.measure import Fidelity, Measurement
from halfbyte.export.source import Source
from halfbyte.models.quantize import quantize


def chosen(folder, **settings):
    return choose(Source.find(folder, MergeConfig(device="cpu", **settings)))


def test_without_rows_it_is_what_training_saw(tiny_base, make_adapter):
    folder, _ = make_adapter(tiny_base)
    choice = chosen(folder)
    assert choice.onto == "dequantized"
    assert "no rows were given" in choice.reason
    assert choice.words() == [choice.reason]


def test_with_rows_the_nearer_one_is_taken(tiny_base, make_adapter, rows):
    folder, _ = make_adapter(tiny_base)
    choice = chosen(folder, data=rows)
    found = choice.measured.candidates
    assert choice.onto == min(found, key=lambda form: found[form].kl) == "dequantized"
    assert set(found) == {"dequantized", "original"}
    assert len(choice.words()) >= 4


def test_what_is_asked_for_is_done_and_measured_beside_the_others(tiny_base, make_adapter, rows):
    folder, _ = make_adapter(tiny_base)
    choice = chosen(folder, data=rows, onto="quantized")
    assert choice.onto == "quantized"
    assert "as asked for" in choice.reason
    assert set(choice.measured.candidates) == {"dequantized", "original", "quantized"}
    assert chosen(folder, onto="original").onto == "original"


def test_a_base_in_4_bits_leaves_no_choice(tiny_base, make_adapter, rows, tmp_path):
    quantize(tiny_base, tmp_path / "four_bit")
    folder, _ = make_adapter(tiny_base)
    choice = chosen(folder, base=tmp_path / "four_bit", data=rows)
    assert choice.onto == "dequantized"
    assert "in 4 bits only" in choice.reason
    assert set(choice.measured.candidates) == {"dequantized"}
    with pytest.raises(AdapterError, match="needs the 16-bit base"):
        chosen(folder, base=tmp_path / "four_bit", onto="original")


def test_a_base_that_training_held_in_16_bits_is_merged_as_it_is(tiny_base, make_adapter):
    folder, _ = make_adapter(tiny_base, in_four_bits=False, identity={"quantization": None})
    choice = chosen(folder)
    assert choice.onto == "original"
    assert "in 16 bits" in choice.reason


def test_too_little_memory_is_said(tiny_base, make_adapter, rows, monkeypatch):
    folder, _ = make_adapter(tiny_base)
    monkeypatch.setattr(measure, "available_bytes", lambda device: 1 << 20)
    choice = chosen(folder, data=rows)
    assert choice.onto == "dequantized"
    assert "Not measured: measuring takes about" in choice.reason


def test_a_lower_loss_elsewhere_is_said():
    found = {
        "dequantized": Fidelity(loss=1.0, kl=0.01, kl_error=0.001, agreement=0.99),
        "original": Fidelity(loss=0.9, kl=0.02, kl_error=0.001, agreement=0.98),
    }
    choice = Choice("dequantized", "Because.", Measurement(3, 1000, 0.99, found))
    assert "the original base has the lower loss" in choice.words()[-1]
    assert "onto=original" in choice.words()[-1]
