"""The base as training saw it, or as it is."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.export.base import BaseWeights, Recipe
from halfbyte.models.load import load
from halfbyte.models.quantize import quantize
from halfbyte.models.skeleton import read_skeleton
from halfbyte.quant.config import NF4Config
from halfbyte.quant.quantizer import nf4_layers


def dense(folder, recipe=None):
    weights = BaseWeights(read_skeleton(folder), recipe)
    return {name: weights.tensor(name) for name in weights.names}


def test_without_a_recipe_the_checkpoint_is_as_it_is(tiny_base):
    state = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto").state_dict()
    found = dense(tiny_base)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "config",
    [
        NF4Config(),
        NF4Config("fp4", double_quant=False),
        NF4Config(block_size=128, skip_modules=["q_proj", "lm_head"]),
    ],
    ids=["nf4", "fp4", "skipped"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_recipe_gives_what_the_loaded_model_multiplies_with(tiny_base, config, dtype):
    model, _ = load(tiny_base, quant=config, dtype=dtype, device="cpu")
    found = dense(tiny_base, Recipe(config, dtype))
    layers = nf4_layers(model)
    assert len(layers) == 14 - (2 if config.skip_modules else 0)
    for name, layer in layers:
        assert torch.equal(found[f"{name}.weight"], layer.dequantize())
    assert torch.equal(found["lm_head.weight"], dense(tiny_base)["lm_head.weight"])


def test_a_4_bit_checkpoint_gives_the_same(tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "four_bit")
    packed, made = dense(tmp_path / "four_bit"), dense(tiny_base, Recipe(NF4Config()))
    assert packed.keys() == made.keys()
    assert all(torch.equal(packed[name], made[name]) for name in made)


def test_dtypes_on_disk_are_known(tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "four_bit")
    name = "model.layers.0.mlp.up_proj.weight"
    assert BaseWeights(read_skeleton(tiny_base)).stored_dtype(name) == torch.bfloat16
    assert BaseWeights(read_skeleton(tmp_path / "four_bit")).stored_dtype(name) is None
