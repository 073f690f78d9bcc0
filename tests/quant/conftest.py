"""Tiny models of several families, with weights that nobody trained."""

import json
from pathlib import Path

import pytest
import torch
import transformers

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128),
}


@pytest.fixture(params=list(CONFIGS))
def family(request):
    return request.param


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Return a function that writes a tiny model, once for each kind, and gives its folder."""
    made: dict[tuple, Path] = {}

    def make(family="llama", *, dtype=torch.bfloat16) -> Path:
        if (family, dtype) not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(family)
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
            model.save_pretrained(folder)
            made[family, dtype] = folder
        return made[family, dtype]

    return make


@pytest.fixture
def tokens():
    return torch.arange(2, 34).view(2, 16)


@pytest.fixture
def load_as_halfbyte():
    """Return a function that loads a 4-bit folder through the quantizer, whoever saved it."""

    def load(folder, **settings):
        config = transformers.AutoConfig.from_pretrained(folder)
        quantization = {
            key: value
            for key, value in config.quantization_config.items()
            if key not in ("load_in_4bit", "load_in_8bit")
        }
        config.quantization_config = quantization | {"quant_method": "halfbyte"}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, **settings)

    return load


@pytest.fixture
def quantization_of():
    """Return a function that reads `quantization_config` from a folder."""

    def read(folder):
        return json.loads((folder / "config.json").read_text())["quantization_config"]

    return read
