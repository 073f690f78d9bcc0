"""Models of real shapes without weights."""

import pytest
import torch
from transformers import LlamaConfig, Olmo2Config

from halfbyte import LoraConfig, NF4Config
from halfbyte.plan.blueprint import blueprint
from halfbyte.plan.predict import Planner

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256, dtype="bfloat16", architectures=["LlamaForCausalLM"],
)  # fmt: skip
OLMO = Olmo2Config(
    hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=1, vocab_size=1024, dtype="bfloat16",
    architectures=["Olmo2ForCausalLM"],
)  # fmt: skip


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory):
    """Return a function that writes a config.json, and nothing else, into a folder."""

    def write(config):
        folder = tmp_path_factory.mktemp("model")
        config.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def llama_8b(config_folder):
    return config_folder(LLAMA_8B)


@pytest.fixture(scope="session")
def llama_8b_model(llama_8b):
    return blueprint(llama_8b, quant=NF4Config(), lora=LoraConfig(r=16), dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def llama_planner(llama_8b_model):
    return Planner(llama_8b_model)


@pytest.fixture(scope="session")
def llama_planner_32(llama_8b):
    lora = LoraConfig(r=32)
    return Planner(blueprint(llama_8b, quant=NF4Config(), lora=lora, dtype=torch.bfloat16))


@pytest.fixture(scope="session")
def unfused_planner(config_folder):
    folder = config_folder(OLMO)
    return Planner(blueprint(folder, quant=NF4Config(), lora=LoraConfig(r=8), dtype=torch.bfloat16))
