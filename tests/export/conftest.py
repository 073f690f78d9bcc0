"""Adapters on the tiny base, made with plain peft, and the models to compare a merge with."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.quant.weight import QuantizedWeight

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NF4 = {"version": 1, "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


def as_training_saw_it(model):
    """Take every linear weight but the output head through NF4, in place."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            quantized = QuantizedWeight.quantize(
                module.weight.data, quant_type="nf4", block_size=64, double_quant=True
            )
            module.weight.data = quantized.dequantize()
    return model


@pytest.fixture
def make_adapter(tmp_path):
    """Return a function that saves a random adapter on a base, and the float32 peft model."""

    def make(base, *, in_four_bits=True, identity=NF4, **settings):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        if in_four_bits:
            model = as_training_saw_it(model)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        adapted = peft.get_peft_model(model.float(), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn_like(parameter)
        folder = tmp_path / "adapter"
        adapted.save_pretrained(folder)
        if identity is not None:
            (folder / "halfbyte.json").write_text(json.dumps(identity))
        return folder, adapted

    return make


@pytest.fixture
def rows():
    """Conversations to measure on."""
    texts = [("hello", "good day"), ("2+2?", "4"), ("who?", "a tiny model"), ("bye", "see you")]
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in texts
    ]
