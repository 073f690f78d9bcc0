import pytest
import torch
from transformers import BitsAndBytesConfig

from halfbyte.errors import ConfigError
from halfbyte.quant.config import NF4Config


def test_takes_bitsandbytes_names():
    config = NF4Config(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=["lm_head"],
    )
    assert config.quant_type == "fp4"
    assert config.compute_dtype == torch.bfloat16
    assert config.double_quant is False
    assert config.skip_modules == ["lm_head"]


@pytest.mark.parametrize("double_quant", [True, False])
def test_saves_bitsandbytes_configuration_key_for_key(double_quant):
    ours = NF4Config(double_quant=double_quant, compute_dtype=torch.float16)
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float16,
    )
    assert ours.to_dict() == theirs.to_dict()


def test_reads_what_it_saves():
    config = NF4Config("fp4", compute_dtype="float16", skip_modules=["lm_head"])
    assert NF4Config.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_type": "int4"},
        {"block_size": 100},
        {"double_quant": "yes"},
        {"compute_dtype": "int8"},
        {"compute_dtype": torch.uint8},
        {"compute_dtype": "load"},
        {"skip_modules": "lm_head"},
        {"skip_modules": [1]},
        {"load_in_8bit": True},
        {"load_in_4bit": False},
        {"blok_size": 64},
    ],
)
def test_refuses_what_it_cannot_do(settings):
    with pytest.raises(ConfigError) as caught:
        NF4Config(**settings)
    assert str(next(iter(settings.values()))).removeprefix("torch.") in caught.value.message
