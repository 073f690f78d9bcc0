"""Base and adapter become tensors: in slabs, rounded once, and what rounding did is measured."""

import pytest

from halfbyte.errors import AdapterError
from halfbyte.export import tensors as module
from halfbyte.export.config import MergeConfig
from halfbyte.export.source import Source
from halfbyte.quant.weight import QuantizedWeight

UP = "model.layers.1.mlp.up_proj.weight"


def merged(folder, form="dequantized", **settings):
    source = Source.find(folder, MergeConfig(device="cpu", **settings))
    return {each.name: each for each in source.merger(form).tensors()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "up_proj"]},
     {"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 200]}],
    ids=["lora", "dora", "embedding", "rows"],
)  # fmt: skip
def test_slabs_of_any_height_give_the_same_bits(tiny_base, make_adapter, monkeypatch, settings):
    folder, _ = make_adapter(tiny_base, **settings)
    whole = merged(folder)
    monkeypatch.setattr(module, "_SLAB_ELEMENTS", 64 * 7)
    slabs = merged(folder)
    for name, each in whole.items():
        # Another shape of the product may sum in another order, so a rounding may fall otherwise.
        differ = (slabs[name].value != each.value).float().mean()
        assert differ < 1e-3, name
        if each.rounding is not None:
            assert slabs[name].rounding.kept == pytest.approx(each.rounding.kept, rel=1e-3)


def test_rounding_is_what_it_says(tiny_base, make_adapter):
    folder, adapted = make_adapter(tiny_base)
    name = UP.removesuffix(".weight")
    layer = adapted.get_submodule(f"base_model.model.{name}")
    base = layer.get_base_layer().weight.detach().double()
    update = layer.get_delta_weight("default").detach().double()
    found = merged(folder)[UP]
    error = found.value.double() - (base + update)
    assert found.rounding.update == pytest.approx(float(update.norm() / base.norm()), rel=1e-5)
    assert found.rounding.lost == pytest.approx(float(error.norm() / update.norm()), rel=1e-4)
    along = ((found.value.double() - base) * update).sum() / update.square().sum()
    assert found.rounding.kept == pytest.approx(float(along), rel=1e-5)
    exact = merged(folder, dtype="float32")[UP].rounding
    assert exact.lost < 1e-5
    assert exact.kept == pytest.approx(1, abs=1e-5)


def test_an_update_smaller_than_the_last_place_is_seen_to_be_lost(tiny_base, make_adapter):
    folder, _ = make_adapter(tiny_base, lora_alpha=1e-4)
    coarse, fine = merged(folder)[UP].rounding, merged(folder, dtype="float32")[UP].rounding
    assert coarse.update < 1e-3
    assert coarse.kept < 0.5
    assert coarse.lost > 0.5
    assert fine.kept == pytest.approx(1, abs=0.01)


def test_quantizing_the_sum_keeps_what_quantizing_the_dequantized_sum_erases(
    tiny_base, make_adapter
):
    """Why merging into 4 bits is Q(W + D) of the 16-bit base, and never of the dequantized one."""
    folder, _ = make_adapter(tiny_base, lora_alpha=0.5)
    found = merged(folder, "quantized")[UP]
    assert isinstance(found.value, QuantizedWeight)
    assert found.rounding.update < 0.05
    assert found.rounding.kept > 0.8
    again = QuantizedWeight.quantize(merged(folder)[UP].value).dequantize().float()
    original = Source.find(folder, MergeConfig()).merger("original").base.tensor(UP)
    seen = QuantizedWeight.quantize(original).dequantize().float()
    update = merged(folder, dtype="float32")[UP].value - seen
    assert float(((again - seen) * update).sum() / update.square().sum()) < 0.3


def test_untouched_tensors_are_no_sums(tiny_base, make_adapter):
    folder, _ = make_adapter(tiny_base, target_modules=["q_proj"])
    found = merged(folder, "original")
    assert {name for name, each in found.items() if each.is_changed} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    }
    dequantized = merged(folder)
    assert sum(each.is_changed for each in dequantized.values()) == 14
    assert dequantized["lm_head.weight"].rounding is None


def test_what_overflows_is_refused(tiny_base, make_adapter):
    folder, _ = make_adapter(tiny_base, lora_alpha=1e9)
    with pytest.raises(AdapterError, match="overflows float16"):
        merged(folder, dtype="float16")


def test_some_may_be_skipped(tiny_base, make_adapter):
    folder, _ = make_adapter(tiny_base)
    merger = Source.find(folder, MergeConfig(device="cpu")).merger("dequantized")
    names = [each.name for each in merger.tensors()]
    assert [each.name for each in merger.tensors(skip=names[:-2])] == names[-2:]
