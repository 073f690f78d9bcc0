"""Settings of the rotary embedding become llama.cpp's, or are refused."""

import math

import gguf
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.errors import CheckpointError
from halfbyte.gguf.rope import llama3_factors, write_rope


def written(rope, model=transformers.LlamaConfig, **settings):
    config = model(hidden_size=64, num_attention_heads=4, rope_parameters=rope, **settings)
    writer = gguf.GGUFWriter(None, "llama")
    factors = write_rope(writer, config, 16)
    values = {key.removeprefix("llama.rope."): v.value for key, v in writer.kv_data[0].items()}
    return values, factors


def test_plain_ones():
    values, factors = written({"rope_type": "default", "rope_theta": 5e5})
    assert values["freq_base"] == 5e5
    assert values["dimension_count"] == 16
    assert not factors


def test_llama3s_factors_divide_its_frequencies():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(plain / torch.tensor(llama3_factors(rope, 128)), expected)
    assert list(written(rope)[1]) == [gguf.MODEL_TENSOR.ROPE_FREQS]


def test_linear_and_yarn_are_numbers():
    values, _ = written({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    assert (values["scaling.type"], values["scaling.factor"]) == ("linear", 4.0)
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    values, _ = written(yarn)
    assert values["scaling.type"] == "yarn"
    assert values["scaling.original_context_length"] == 32768


def test_longrope_has_factors_and_the_attention_scale_of_transformers():
    factors = [1.0 + i for i in range(8)]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": factors,
        "short_factor": factors[::-1],
        "original_max_position_embeddings": 1024,
    }
    values, tensors = written(
        rope,
        transformers.Phi3Config,
        max_position_embeddings=8192,
        original_max_position_embeddings=1024,
        pad_token_id=0,
        vocab_size=100,
    )
    assert values["scaling.attn_factor"] == pytest.approx(math.sqrt(1 + 3 / 10))
    assert tensors[gguf.MODEL_TENSOR.ROPE_FACTORS_LONG] == factors
    assert tensors[gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT] == factors[::-1]


def test_what_llama_cpp_lacks_is_refused():
    with pytest.raises(CheckpointError, match="no counterpart to rope_type='dynamic'"):
        written({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 2.0}
    with pytest.raises(CheckpointError, match="attention_factor"):
        written({**yarn, "original_max_position_embeddings": 512})
