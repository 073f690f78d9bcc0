"""Rows that join at different times give the logits of each text alone, in every family."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from halfbyte.errors import ConfigError
from halfbyte.serve.forward import BatchedModel

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 4}),
    "qwen2": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {"sliding_window": 4, "attn_implementation": "eager"},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {"sliding_window": 5}),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    config, kind, settings = FAMILIES[request.param]
    torch.manual_seed(0)
    return kind(config(**SHAPE, **settings)).eval()


@torch.no_grad()
def test_rows_are_what_they_are_alone(model):
    batched = BatchedModel(model, num_rows=3, num_tokens=40)
    texts = [[5, 9, 11, 3, 8, 2, 60, 14, 9], [7], [40, 41, 42, 43, 44]]

    def alone(ids):
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]

    def check(logits, rows):
        for got, row in zip(logits, rows, strict=True):
            torch.testing.assert_close(got, alone(texts[row]), atol=1e-4, rtol=1e-3)
            texts[row].append(int(got.argmax()))

    def step(rows):
        tokens, places = [texts[r][-1] for r in rows], [len(texts[r]) - 1 for r in rows]
        check(batched.decode(tokens, places, [0] * len(rows)), rows)

    cache = DynamicCache()
    check(batched.prefill(texts[:2], [0, 0], cache), [0, 1])
    for row in (0, 1):
        batched.cache.join(row, cache, row, len(texts[row]) - 1)
    for _ in range(3):
        step([0, 1])
    # A third joins, read in two pieces; then the first leaves, and the third takes its place.
    pieces = DynamicCache()
    batched.prefill([texts[2][:3]], [0], pieces, is_partial=True)
    check(batched.prefill([texts[2][3:]], [0], pieces), [2])
    batched.cache.join(2, pieces, 0, 5)
    step([0, 1, 2])
    batched.cache.move(2, 0, len(texts[2]) - 1)
    for _ in range(4):
        step([2, 1])


def test_other_kinds_of_layers_are_refused():
    config = transformers.LlamaConfig(**SHAPE)
    model = transformers.LlamaForCausalLM(config)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="linear_attention") as caught:
        BatchedModel(model, num_rows=1, num_tokens=8)
    assert "vLLM" in caught.value.hint
