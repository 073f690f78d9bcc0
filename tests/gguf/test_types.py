"""Each tensor gets the type that llama.cpp would give it."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from halfbyte.errors import ConfigError
from halfbyte.gguf.types import check_file_type, encode, num_bytes, tensor_type


def kind_of(name, shape, file_type, output="output.weight"):
    return tensor_type(name, shape, file_type, num_layers=32, output=output)


def test_vectors_stay_float32():
    for file_type in ("f16", "q8_0", "q4_k_m"):
        assert kind_of("blk.0.attn_norm.weight", (256,), file_type) == Type.F32


def test_the_mixture_is_llama_cpps():
    # From `llama-quantize ... Q4_K_M` of a 32-layer Llama: use_more_bits(layer, 32).
    more = [
        layer
        for layer in range(32)
        if kind_of(f"blk.{layer}.attn_v.weight", (256, 256), "q4_k_m") == Type.Q6_K
    ]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert kind_of("blk.6.ffn_down.weight", (256, 512), "q4_k_m") == Type.Q6_K
    assert kind_of("blk.5.ffn_down.weight", (256, 512), "q4_k_m") == Type.Q4_K
    assert kind_of("blk.0.attn_q.weight", (256, 256), "q4_k_m") == Type.Q4_K
    assert kind_of("output.weight", (1000, 256), "q4_k_m") == Type.Q6_K
    assert kind_of("token_embd.weight", (1000, 256), "q4_k_m") == Type.Q4_K
    tied = kind_of("token_embd.weight", (1000, 256), "q4_k_m", output="token_embd.weight")
    assert tied == Type.Q6_K


def test_rows_that_do_not_divide_fall_back():
    assert kind_of("blk.0.attn_q.weight", (64, 96), "q4_k_m") == Type.Q5_0
    assert kind_of("output.weight", (64, 96), "q4_k_m") == Type.Q8_0
    assert kind_of("blk.0.attn_q.weight", (64, 40), "q4_k_m") == Type.F16
    assert kind_of("blk.0.attn_q.weight", (64, 40), "q8_0") == Type.F16


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q6_K])
def test_bytes_are_those_that_were_announced(kind, monkeypatch):
    weight = torch.randn(10, 512, generator=torch.Generator().manual_seed(0))
    whole = encode(weight, kind)
    assert whole.nbytes == num_bytes(weight.shape, kind)
    monkeypatch.setattr("halfbyte.gguf.types._CHUNK_VALUES", 3 * 512)
    assert (encode(weight, kind) == whole).all()  # in pieces, the same


def test_bf16_is_torchs():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert (
        encode(weight, Type.BF16).view("uint8") == gguf.quantize(weight.numpy(), Type.BF16)
    ).all()


def test_unknown_types_are_named():
    with pytest.raises(ConfigError, match="one of f32, f16"):
        check_file_type("q2_k")
