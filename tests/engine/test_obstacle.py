import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
)

from halfbyte.engine import obstacle as module
from halfbyte.engine.obstacle import obstacle

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL = {"target_modules": "all-linear"}


def body_of(config, **lora):
    model = AutoModelForCausalLM.from_config(config).float()
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **lora)).base_model
        return model.model.model
    return model.base_model


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (ALL, None),
        ({**ALL, "use_dora": True}, "q_proj is adapted with DoRA"),
        ({**ALL, "lora_bias": True}, "q_proj has a bias on lora_B"),
        ({**ALL, "bias": "all"}, "it trains self_attn.q_proj.base_layer.bias beside adapters"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
            "it trains input_layernorm.modules_to_save.default.weight beside adapters",
        ),
    ],
)
def test_what_of_an_adapter_does_not_run_fused_is_named(lora, reason):
    config = LlamaConfig(**SIZES, attention_bias="bias" in lora)
    assert obstacle(body_of(config, **lora)) == reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SIZES), None),
        (LlamaConfig(**SIZES, hidden_act="relu"), "its activation is relu"),
        (LlamaConfig(**SIZES, attention_dropout=0.1), "attention_dropout is 0.1"),
        (Gemma2Config(**SIZES), "its attention scores are capped at 50.0"),
        (
            Gemma3TextConfig(**SIZES, use_bidirectional_attention=True),
            "its attention looks ahead",
        ),
        (Phi3Config(**SIZES, resid_pdrop=0.1), "resid_attn_dropout is 0.1"),
        (GraniteConfig(**SIZES), "its layers are GraniteDecoderLayer"),
        (Olmo2Config(**SIZES), "its layers are Olmo2DecoderLayer"),
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=16), "its body is not"),
    ],
)
def test_what_of_a_model_does_not_run_fused_is_named(config, reason):
    found = obstacle(body_of(config))
    assert found == reason or (reason is not None and found.startswith(reason))


def test_windows_need_a_pytorch_that_packs_them(monkeypatch):
    body = body_of(Phi3Config(**SIZES, sliding_window=4))
    assert obstacle(body) is None
    monkeypatch.setattr(module, "has_windows", lambda: False)
    assert torch.__version__ in obstacle(body)
