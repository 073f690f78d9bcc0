"""An adapter and its base are found, and which forms they can be merged in."""

import pytest
import torch

from halfbyte.errors import AdapterError
from halfbyte.export.config import MergeConfig
from halfbyte.export.source import Source
from halfbyte.models.quantize import quantize
from halfbyte.quant.config import NF4Config


def find(folder, **settings):
    return Source.find(folder, MergeConfig(**settings))


def test_the_recipe_is_that_of_the_training(tiny_base, make_adapter):
    identity = {
        "quantization": NF4Config("fp4").to_dict(),
        "weights": {"block_size": 128, "dtype": "float32"},
    }
    folder, _ = make_adapter(tiny_base, identity=identity)
    source = find(folder)
    assert source.recipe.dtype == torch.float32
    quant = source.quant("quantized")
    assert (quant.quant_type, quant.block_size) == ("fp4", 128)
    assert source.quant("original") is None
    assert source.reference_quant is source.recipe.config


def test_what_the_caller_says_wins(tiny_base, make_adapter):
    folder, _ = make_adapter(tiny_base, identity=None)
    assert find(folder, quant=NF4Config("fp4")).recipe.config.quant_type == "fp4"
    with pytest.raises(AdapterError, match="how training held the base"):
        find(folder).merger("dequantized")
    assert find(folder).merger("original").base.is_as_stored("lm_head.weight")


@pytest.mark.parametrize("form", ["original", "quantized"])
def test_a_base_in_4_bits_has_no_original(tiny_base, make_adapter, tmp_path, form):
    quantize(tiny_base, tmp_path / "four_bit")
    folder, _ = make_adapter(tiny_base, identity=None)
    source = find(folder, base=tmp_path / "four_bit")
    assert source.is_packed
    assert source.recipe is None
    assert source.reference_quant is not None
    source.merger("dequantized")
    with pytest.raises(AdapterError, match="needs the 16-bit base"):
        source.merger(form)
