"""A tiny Llama, in bf16, in our 4 bits and in bitsandbytes' 4 bits, and what adapters need."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from halfbyte.quant.config import NF4Config

# Inner sizes are multiples of 64: bitsandbytes' CPU code is wrong elsewhere.
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make_llama(seed=0, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(**(TINY | changes), dtype=torch.bfloat16)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def save_llama(folder, **changes):
    make_llama(**changes).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def base_path(tmp_path_factory):
    """A tiny bf16 Llama on disk."""
    return save_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def other_path(tmp_path_factory):
    """A Llama of the same shape with other weights."""
    return save_llama(tmp_path_factory.mktemp("base") / "other", seed=1)


@pytest.fixture(scope="session")
def wide_path(tmp_path_factory):
    """A Llama of another shape."""
    return save_llama(tmp_path_factory.mktemp("base") / "wide", intermediate_size=192)


@functools.cache
def load_once(kind, path):
    bitsandbytes = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    config = {"nf4": NF4Config(), "bnb": bitsandbytes, "bf16": None}[kind]
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.bfloat16
    )


@pytest.fixture
def load(base_path):
    """Load the tiny model: `load()` in our 4 bits, `load("bnb")` in theirs, `load("bf16")`."""

    def load_model(kind="nf4", path=base_path):
        return copy.deepcopy(load_once(kind, path))

    return load_model


@pytest.fixture
def randomize():
    """Give every adapter parameter a value that shows in the output."""

    def fill(model, seed=0, std=0.05):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_A" in name or "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.data.copy_(noise.to(parameter.dtype))
        return model

    return fill


@pytest.fixture
def input_ids():
    return torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
