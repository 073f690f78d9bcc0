"""A run is another one when what it learns could differ, and only then."""

import json

import pytest

from halfbyte.data.loader import BatchPlan
from halfbyte.errors import ConfigError
from halfbyte.train.config import TrainConfig
from halfbyte.train.identity import identify, require_same
from halfbyte.train.inputs import Inputs


@pytest.fixture
def identity_of(make_lora, rows_of):
    def make(fingerprint="f", steps=9, lora=None, **settings):
        inputs = Inputs(rows_of([5, 6]), None, fingerprint)
        config = TrainConfig(**settings)
        plan = BatchPlan(
            inputs.train,
            batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=1,
            packing=False,
            max_length=0,
            seed=config.seed,
            pad_token_id=0,
        )
        return identify(make_lora(**(lora or {})), inputs, plan, config, steps)

    return make


def test_survives_json(identity_of):
    identity = identity_of()
    assert json.loads(json.dumps(identity)) == identity


@pytest.mark.parametrize(
    "settings",
    [
        {"output_dir": "elsewhere"},
        {"logging_steps": 7},
        {"save_steps": 7, "save_total_limit": 2},
        {"eval_steps": 7, "eval_on_start": True},
        {"resume_from_checkpoint": "auto"},
        {"gradient_checkpointing": True},
        {"report_to": "wandb", "run_name": "again"},
    ],
)
def test_settings_that_teach_nothing_do_not_count(identity_of, settings):
    assert identity_of(**settings) == identity_of()


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-3},
        {"per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 3},
        {"optim": "adamw_8bit"},
        {"weight_decay": 0.5},
        {"warmup_steps": 3},
        {"max_grad_norm": 0.3},
        {"deterministic": True},
        {"fingerprint": "g"},
        {"steps": 10},
        {"lora": {"lora_dropout": 0.3}},
    ],
)
def test_what_is_learned_counts(identity_of, settings):
    saved, current = identity_of(), identity_of(**settings)
    with pytest.raises(ConfigError, match=r"was another one: .* was .* is "):
        require_same(saved, current, allowed=False)
    assert len(require_same(saved, current, allowed=True)) == 1


def test_unknown_base_is_not_a_difference(identity_of):
    saved = {**identity_of(), "base": None}
    assert require_same(saved, identity_of(), allowed=False) == []
