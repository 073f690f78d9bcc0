import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from halfbyte.quant.config import NF4Config

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_llama(seed=0, dtype=torch.bfloat16, **changes):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes))).to(dtype)
    model.config.dtype = dtype
    return model


@pytest.fixture(scope="session")
def base_path(tmp_path_factory):
    """A tiny bf16 Llama on disk."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    make_llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def other_path(tmp_path_factory):
    """A Llama of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("base") / "other"
    make_llama(seed=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def load(base_path):
    """Load the tiny model: `load()` in 4 bits, `load(None)` in bf16."""

    def load_model(config="nf4", path=base_path, **kwargs):
        quantization = NF4Config() if config == "nf4" else config
        kwargs.setdefault("dtype", torch.bfloat16)
        return AutoModelForCausalLM.from_pretrained(
            path, quantization_config=quantization, **kwargs
        )

    return load_model


def randomize(model, seed=0):
    """Give every adapter parameter a value that shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.copy_(noise.to(parameter.dtype))
    return model


def batch(rows=2, length=12, seed=0, vocab_size=128):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (rows, length), generator=generator)
