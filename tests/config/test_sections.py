"""Sections become the configurations of their parts, field by field."""

import dataclasses
import inspect

import peft

from halfbyte.config.sections import LoraSection, QuantSection
from halfbyte.quant.config import NF4Config


def test_lora_has_pefts_names():
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(LoraSection.model_fields) <= known


def test_quant_has_the_names_of_nf4config():
    assert set(QuantSection.model_fields) <= set(inspect.signature(NF4Config).parameters)


def test_defaults_are_those_of_nf4config():
    built, default = QuantSection().build(), NF4Config()
    for name in QuantSection.model_fields:
        assert getattr(built, name) == getattr(default, name)


def test_lora_is_built_for_language_models():
    built = LoraSection(r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2}).build()
    assert built.task_type == "CAUSAL_LM"
    assert built.target_modules == {"q_proj"}
    assert built.rank_pattern == {"q_proj": 2}
