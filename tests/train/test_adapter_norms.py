"""The size of every trained LoRA layer, by its name."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from halfbyte.train.adapter_norms import AdapterProbe


def test_norms_are_those_of_the_weights(make_lora):
    model = make_lora()
    probe = AdapterProbe(model)
    assert probe.read() is None
    probe.measure()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # too late to be seen
    found = probe.read()
    assert probe.read() is None
    assert len(found) == 14
    for name, norms in found.items():
        layer = model.get_submodule(name)
        for norm, part in ((norms.rms_a, layer.lora_A), (norms.rms_b, layer.lora_B)):
            weight = part["default"].weight
            assert norm == pytest.approx(float(weight.norm()) / 2 / math.sqrt(weight.numel()))


def test_only_what_is_trained_counts(make_llama):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(make_llama(), config)
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").requires_grad_(False)
    probe = AdapterProbe(model)
    probe.measure()
    assert list(probe.read()) == ["base_model.model.model.layers.1.self_attn.q_proj"]


def test_model_without_lora_has_none(make_llama):
    probe = AdapterProbe(make_llama())
    probe.measure()
    assert probe.read() == {}
