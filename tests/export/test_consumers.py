"""What vLLM and llama.cpp cannot take of an adapter is said, and what they can is left alone.

Their rules are written down here as their loaders apply them to the files, so that the check is
compared with them and not with itself.
"""

import json

import peft
import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from halfbyte.adapters.inject import add_lora
from halfbyte.adapters.io import save_adapter
from halfbyte.export.consumers import adapter_limits
from halfbyte.models.load import load

MERGE = "halfbyte merge"


def keys(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return list(file.keys())


def vllm_takes(folder, max_lora_rank=16):
    """vLLM: PEFTHelper.validate_legal, parse_fine_tuned_lora_name, is_base_embedding_weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if not {"r", "lora_alpha", "target_modules"} <= set(config):
        return False
    if config.get("modules_to_save") or config.get("use_dora"):
        return False
    if config["r"] > max_lora_rank or config.get("bias", "none") != "none":
        return False
    for name in keys(folder):
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        parts = name.split(".")
        is_pair = parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        if not is_pair and parts[-1] not in ("lora_embedding_A", "lora_embedding_B"):
            return False
    return True


def llama_cpp_takes(folder):
    """llama.cpp: LoraModel.get_tensors of convert_lora_to_gguf.py."""
    for name in keys(folder):
        is_pair = any(
            part in name
            for part in (
                ".lora_A.weight",
                ".lora_B.weight",
                ".lora_embedding_A",
                ".lora_embedding_B",
            )
        )
        if not is_pair and ".base_layer.weight" not in name and "norm" not in name:
            return False
    return True


def saved(base, folder, **settings):
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], **settings}
    peft.get_peft_model(model, peft.LoraConfig(**settings)).save_pretrained(folder)
    return folder


def said(folder, consumer):
    return [limit for limit in adapter_limits(folder) if limit.consumer == consumer]


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_of_a_plain_lora_nothing_is_said(tiny_base, tmp_path, settings):
    folder = saved(tiny_base, tmp_path / "adapter", **settings)
    assert vllm_takes(folder)
    assert llama_cpp_takes(folder)
    assert adapter_limits(folder) == []


def test_what_halfbyte_saves_by_default_is_taken(tiny_base, tmp_path):
    model, _ = load(tiny_base, device="cpu")
    save_adapter(add_lora(model, r=16), tmp_path / "adapter")
    assert vllm_takes(tmp_path / "adapter")
    assert llama_cpp_takes(tmp_path / "adapter")
    assert adapter_limits(tmp_path / "adapter") == []


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save (lm_head)"),
        ({"bias": "all"}, "biases"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "biases"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_what_both_refuse_is_said_of_both(make_base, tmp_path, settings, word):
    folder = saved(make_base(attention_bias=True), tmp_path / "adapter", **settings)
    assert not vllm_takes(folder)
    assert not llama_cpp_takes(folder)
    for consumer in ("vLLM", "llama.cpp"):
        (limit,) = said(folder, consumer)
        assert word in limit.problem
        assert MERGE in limit.advice
        assert str(limit) == f"{consumer} {limit.problem}: {limit.advice}"


def test_tables_of_new_tokens_are_said(tiny_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(264)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert not vllm_takes(tmp_path / "adapter")
    for consumer in ("vLLM", "llama.cpp"):
        (limit,) = said(tmp_path / "adapter", consumer)
        assert "new tokens" in limit.problem


@pytest.mark.parametrize(
    ("settings", "consumers"),
    [
        ({"alpha_pattern": {"q_proj": 4}}, {"vLLM", "llama.cpp"}),
        ({"rank_pattern": {"q_proj": 4}}, {"vLLM"}),
        ({"use_rslora": True}, {"llama.cpp"}),
    ],
)
def test_what_would_be_scaled_wrongly_without_a_word_is_said(
    tiny_base, tmp_path, settings, consumers
):
    folder = saved(tiny_base, tmp_path / "adapter", **settings)
    limits = adapter_limits(folder)
    assert {limit.consumer for limit in limits} == consumers
    for limit in limits:
        assert ("halfbyte export" if limit.consumer == "llama.cpp" else MERGE) in limit.advice


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"r": 16}, None),
        ({"r": 17}, "--max-lora-rank 32"),
        ({"r": 512}, "--max-lora-rank 512"),
        ({"r": 513}, MERGE),
    ],
)
def test_vllm_is_to_be_started_for_the_rank(tiny_base, tmp_path, settings, advice):
    folder = saved(tiny_base, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    limits = adapter_limits(folder)
    assert [advice in limit.advice for limit in limits] == ([] if advice is None else [True])
    assert vllm_takes(folder) == (advice is None)
