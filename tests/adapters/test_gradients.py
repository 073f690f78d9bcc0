"""A LoRA step's gradients on the 4-bit model, against peft on bitsandbytes and against float64."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from halfbyte.adapters.inject import add_lora, use_fast_layers
from halfbyte.quant.linear import NF4Linear

SETTINGS = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}


def gradients(model, input_ids):
    """One forward and backward: the loss, the gradients of all adapters."""
    model.zero_grad()
    loss = model(input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    found = {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return loss.item(), found


def exact_model(quantized_base):
    """The same model in float64, its weights those that the 4-bit codes stand for."""
    dense = LlamaForCausalLM(copy.deepcopy(quantized_base.config)).double()
    state = {}
    for name, module in quantized_base.named_modules():
        if isinstance(module, NF4Linear):
            state[f"{name}.weight"] = module.dequantize(torch.bfloat16).double()
        elif isinstance(module, nn.Linear | nn.Embedding) or name.endswith("norm"):
            state[f"{name}.weight"] = module.weight.detach().double()
    dense.load_state_dict(state)
    return dense


@pytest.fixture
def models(load, randomize):
    """The four contestants, with the same adapters on the same weights."""
    base = load()
    exact = peft.get_peft_model(exact_model(base), peft.LoraConfig(**SETTINGS)).double()
    by_peft = peft.get_peft_model(load(), peft.LoraConfig(**SETTINGS))
    bitsandbytes = peft.get_peft_model(load("bnb"), peft.LoraConfig(**SETTINGS))
    ours = add_lora(base, **SETTINGS)
    contestants = {
        "exact": exact,
        "bitsandbytes": bitsandbytes,
        "peft_layers": by_peft,
        "ours": ours,
    }
    return {name: randomize(model, std=0.1).train() for name, model in contestants.items()}


def distance(a, b):
    """Distance of two sets of gradients, relative to the second."""
    assert a.keys() == b.keys()
    apart = sum((a[name] - b[name]).square().sum() for name in b)
    return (apart / sum(grad.square().sum() for grad in b.values())).sqrt().item()


def test_equal_those_of_float64_and_of_peft_on_bitsandbytes(models, input_ids):
    results = {name: gradients(model, input_ids) for name, model in models.items()}
    exact_loss, exact = results["exact"]
    error = {name: distance(grads, exact) for name, (_, grads) in results.items()}
    # bf16 keeps 8 bits; two layers of it, forward and backward, stay below a few of its roundings.
    assert error["ours"] < 0.02
    assert error["ours"] <= 1.5 * error["bitsandbytes"]
    assert distance(results["ours"][1], results["bitsandbytes"][1]) < 0.03
    for name in ("ours", "bitsandbytes", "peft_layers"):
        assert results[name][0] == pytest.approx(exact_loss, rel=2e-3)


def test_every_single_matrix_is_right(models, input_ids):
    _, exact = gradients(models["exact"], input_ids)
    _, ours = gradients(models["ours"], input_ids)
    _, theirs = gradients(models["bitsandbytes"], input_ids)
    for name, want in exact.items():
        error = (ours[name] - want).norm() / want.norm()
        plain = (theirs[name] - want).norm() / want.norm()
        assert error < max(2 * plain, 0.01), name


def test_fast_layers_are_as_exact_as_pefts_in_bf16(models, input_ids):
    _, exact = gradients(models["exact"], input_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # otherwise peft's adapters run in float32
        before = distance(gradients(models["peft_layers"], input_ids)[1], exact)
    assert use_fast_layers(models["peft_layers"]) == 14
    after = distance(gradients(models["peft_layers"], input_ids)[1], exact)
    assert after <= 1.2 * before


def test_float32_base_gives_float32_gradients(load, randomize, input_ids):
    """On a CPU without bf16 everything runs in float32: then errors are float32's."""
    base = load("bf16").float()
    exact = randomize(
        peft.get_peft_model(copy.deepcopy(base).double(), peft.LoraConfig(**SETTINGS))
    )
    ours = randomize(add_lora(base, **SETTINGS))
    assert distance(gradients(ours, input_ids)[1], gradients(exact.double(), input_ids)[1]) < 1e-5
