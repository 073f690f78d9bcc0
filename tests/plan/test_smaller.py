"""A model with smaller adapters is planned as if it had been made with them."""

import pytest
import torch
from transformers import LlamaConfig

from halfbyte import LoraConfig, NF4Config
from halfbyte.plan.blueprint import blueprint
from halfbyte.plan.predict import Planner, Setting
from halfbyte.plan.smaller import rank_of, smaller_adapters, target_names

SMALL = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=1024, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SETTING = Setting(rows=2, length=512, memory="lean")


@pytest.fixture(scope="module")
def make(config_folder):
    folder = config_folder(SMALL)
    return lambda **lora: blueprint(
        folder, quant=NF4Config(), lora=LoraConfig(**lora), dtype=torch.bfloat16
    )


@pytest.mark.parametrize(
    ("smaller", "lora"),
    [({"divisor": 4}, {"r": 16}), ({"targets": ATTENTION}, {"r": 64, "target_modules": ATTENTION})],
)
def test_the_plan_is_that_of_a_model_made_so(smaller, lora, make):
    model, other = make(r=64), make(**lora)
    before = Planner(model).predict(SETTING).peak
    with smaller_adapters(model, **smaller):
        found = Planner(model).predict(SETTING).peak
    assert found == Planner(other).predict(SETTING).peak
    assert found.nbytes < before.nbytes
    assert Planner(model).predict(SETTING).peak == before  # as it was


def test_adapters_are_put_back_whatever_happens(make):
    model = make(r=8)
    parameters = dict(model.named_parameters())
    with (
        pytest.raises(RuntimeError, match="inside"),
        smaller_adapters(model, divisor=2, targets=[]),
    ):
        raise RuntimeError("inside")
    assert all(parameters[name] is p for name, p in model.named_parameters())


def test_rank_and_targets_are_read_from_the_layers(make):
    model = make(r=8)
    assert rank_of(model) == 8
    every, attention = target_names(model)
    assert set(every) == {*ATTENTION, "gate_proj", "up_proj", "down_proj"}
    assert set(attention) == set(ATTENTION)
