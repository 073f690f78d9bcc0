"""What is measured of a merge is what the written files then show."""

import pytest
import torch
from datasets import Dataset

from halfbyte.errors import DataError, DeviceError
from halfbyte.export import measure as module
from halfbyte.export.config import MergeConfig
from halfbyte.export.measure import measure
from halfbyte.export.merge import merge
from halfbyte.export.source import Source
from halfbyte.models.load import load
from halfbyte.models.quantize import quantize
from halfbyte.train.inputs import tokenized


def source(folder, rows, **settings):
    return Source.find(folder, MergeConfig(data=rows, device="cpu", **settings))


def plain_loss(folder, rows, **settings):
    """Return the loss of a model's own forward pass, a row at a time."""
    model, tokenizer = load(folder, device="cpu", **settings)
    losses, tokens = [], 0
    for row in tokenized(rows, tokenizer, seed=0):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item() * count)
        tokens += count
    return sum(losses) / tokens


@pytest.mark.parametrize(
    ("is_tied", "settings"), [(False, {}), (True, {"target_modules": ["q_proj", "embed_tokens"]})]
)
def test_it_is_what_the_written_model_shows(
    make_base, make_adapter, rows, tmp_path, settings, is_tied
):
    folder, _ = make_adapter(make_base(tie_word_embeddings=is_tied), **settings)
    found = measure(source(folder, rows), ["original", "dequantized", "quantized"])
    for form, one in found.candidates.items():
        merge(folder, tmp_path / form, onto=form, device="cpu")
        assert one.loss == pytest.approx(plain_loss(tmp_path / form, rows, quant=None), abs=5e-3)
    assert found.reference_loss == pytest.approx(plain_loss(folder, rows), abs=5e-3)


def test_the_divergence_is_that_of_the_formula(tiny_base, make_adapter, rows):
    folder, _ = make_adapter(tiny_base)
    found = measure(source(folder, rows, dtype="float32"), ["original", "dequantized"])
    near, far = found.candidates["dequantized"], found.candidates["original"]
    assert 0 <= near.kl < 1e-3 < far.kl
    assert near.agreement == pytest.approx(1, abs=0.05)
    assert 0 < far.kl_error < far.kl
    assert found.rows == 4


def test_rows_and_tokens_are_bounded(tiny_base, make_adapter, monkeypatch):
    folder, _ = make_adapter(tiny_base)
    rows = Dataset.from_dict(
        {"input_ids": [[1] + [2] * 20] * 50, "labels": [[-100] + [2] * 20] * 50}
    )
    monkeypatch.setattr(module, "MAX_TOKENS", 50)
    found = measure(source(folder, rows), ["original"])
    assert (found.tokens, found.rows) == (50, 3)


def test_rows_that_teach_nothing_are_refused(tiny_base, make_adapter):
    folder, _ = make_adapter(tiny_base)
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, -100]]})
    with pytest.raises(DataError, match="supervised token"):
        measure(source(folder, rows), ["original"])


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    tiny_base, make_adapter, rows, monkeypatch
):
    folder, _ = make_adapter(tiny_base)
    monkeypatch.setattr(module, "available_bytes", lambda device: 1 << 20)
    with pytest.raises(DeviceError, match="are free"):
        measure(source(folder, rows), ["original"])


def test_a_4_bit_base_can_be_measured(tiny_base, make_adapter, rows, tmp_path):
    quantize(tiny_base, tmp_path / "four_bit")
    folder, _ = make_adapter(tiny_base)
    found = measure(source(folder, rows, base=tmp_path / "four_bit"), ["dequantized"])
    assert found.candidates["dequantized"].kl < 1e-2
