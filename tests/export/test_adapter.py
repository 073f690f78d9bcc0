"""Every key of an adapter has its place, or the adapter is refused."""

import math
from pathlib import Path

import peft
import pytest
import torch

from halfbyte.adapters.files import AdapterFiles
from halfbyte.errors import AdapterError
from halfbyte.export.adapter import check_mergeable, updates_by_tensor
from halfbyte.export.updates import (
    BiasUpdate,
    EmbeddingUpdate,
    LoraUpdate,
    ReplaceUpdate,
    RowsUpdate,
)

Q = "model.layers.0.self_attn.q_proj"


def adapter(*keys, **settings):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **settings)
    tensors = {key: torch.ones(1) for key in keys}
    return AdapterFiles(Path("folder"), config, tensors, {})


def pair(module):
    return [f"base_model.model.{module}.lora_{part}.weight" for part in "AB"]


def test_scaling_follows_pefts_rules():
    def scaling(module, **settings):
        return updates_by_tensor(adapter(*pair(module), **settings))[f"{module}.weight"][0].scaling

    assert scaling(Q) == 2
    assert scaling(Q, use_rslora=True) == 8 / math.sqrt(4)
    assert scaling(Q, rank_pattern={"q_proj": 2}) == 4
    assert scaling(Q, alpha_pattern={"layers.0.self_attn.q_proj": 16}) == 4
    assert scaling(Q, alpha_pattern={"layers.1.self_attn.q_proj": 16, "0.*q_proj": 32}) == 8


def test_keys_become_updates_of_tensors():
    prefix = "base_model.model."
    found = updates_by_tensor(
        adapter(
            *pair(Q),
            f"{prefix}{Q}.lora_magnitude_vector",
            f"{prefix}{Q}.lora_B.bias",
            f"{prefix}{Q}.base_layer.bias",
            f"{prefix}model.embed_tokens.lora_embedding_A",
            f"{prefix}model.embed_tokens.lora_embedding_B",
            f"{prefix}model.embed_tokens.base_layer.weight",
            f"{prefix}lm_head.weight",
            f"{prefix}model.other.token_adapter.trainable_tokens_delta",
            modules_to_save=["lm_head"],
            trainable_token_indices={"other": [1, 2]},
        )
    )
    kinds = {name: [type(update) for update in updates] for name, updates in found.items()}
    assert kinds == {
        f"{Q}.weight": [LoraUpdate],
        f"{Q}.bias": [ReplaceUpdate, BiasUpdate],
        "model.embed_tokens.weight": [ReplaceUpdate, EmbeddingUpdate],
        "lm_head.weight": [ReplaceUpdate],
        "model.other.weight": [RowsUpdate],
    }
    assert found[f"{Q}.weight"][0].magnitude == f"{prefix}{Q}.lora_magnitude_vector"
    assert found["model.other.weight"][0].indices == (1, 2)


def test_transposed_modules_are_marked():
    found = updates_by_tensor(adapter(*pair(Q)), {f"{Q}.weight"})
    assert found[f"{Q}.weight"][0].is_transposed


def test_tables_that_grew_with_new_tokens_take_the_place_of_the_old_ones():
    found = updates_by_tensor(adapter(*pair(Q), "base_model.model.lm_head.weight"))
    assert found["lm_head.weight"] == [ReplaceUpdate("base_model.model.lm_head.weight")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (pair(Q)[:1], "no lora_B for"),
        (pair(Q)[1:], "no lora_A for"),
        ([*pair(Q), "base_model.model.model.norm.weight"], "no LoRA tensor"),
        ([key.removeprefix("base_model.model.") for key in pair(Q)], "no LoRA tensor"),
    ],
)
def test_keys_without_a_place_are_refused(keys, message):
    with pytest.raises(AdapterError, match=message):
        updates_by_tensor(adapter(*keys))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_inits_that_change_the_base_are_refused(init):
    made = adapter()
    made.config.init_lora_weights = init
    with pytest.raises(AdapterError, match="changes the base") as caught:
        check_mergeable(made)
    assert "path_initial_model" in caught.value.hint


@pytest.mark.parametrize(
    "setting", [{"target_parameters": ["experts.gate_up_proj"]}, {"layer_replication": [(0, 2)]}]
)
def test_settings_that_would_merge_wrong_are_refused(setting):
    made = adapter()
    for name, value in setting.items():
        setattr(made.config, name, value)
    with pytest.raises(AdapterError, match=next(iter(setting))):
        check_mergeable(made)
