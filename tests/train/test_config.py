"""Settings out of range are refused with what was given; usual ones mean what they usually do."""

import pytest
from pydantic import BaseModel

from halfbyte.errors import ConfigError
from halfbyte.train.config import TrainConfig, steps_between


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "learning_rate: greater than 0, got 0"),
        ({"learning_rate": -1e-4}, "learning_rate: greater than 0, got -0.0001"),
        ({"learning_rate": 1e10}, "learning_rate: less than or equal to 1, got 1"),
        ({"learning_rate": float("nan")}, "learning_rate: a finite number, got nan"),
        ({"max_steps": 0}, "max_steps: expected at least 1, or -1 .*, got 0"),
        ({"max_steps": -2}, "max_steps: expected at least 1"),
        ({"num_train_epochs": 0}, "num_train_epochs: greater than 0"),
        ({"warmup_steps": 20, "max_steps": 10}, "warmup_steps 20 is more than max_steps 10"),
        ({"warmup_steps": -1}, "warmup_steps: greater than or equal to 0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio: less than or equal to 1"),
        ({"save_steps": 0}, "save_steps: greater than 0"),
        ({"save_steps": 2.5}, "save_steps: expected a whole number of steps, or a share below 1"),
        ({"memory": "huge"}, "memory: auto, lean, fast, or a size such as 6GiB, got 'huge'"),
        ({"memory": 0}, "memory: auto, lean, fast, or a size such as 6GiB, got 0"),
        ({"compute": "fp16"}, "compute: 'bf16' or 'fp8', got 'fp16'"),
        ({"save_total_limit": 0}, "save_total_limit: greater than or equal to 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: greater than or equal"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: greater than or equal"),
        ({"max_grad_norm": -1}, "max_grad_norm: greater than or equal to 0"),
        ({"optim": "sgd"}, "optim: expected one of adamw, .*paged_adamw_8bit, got 'sgd'"),
        ({"lr_scheduler_type": "exp"}, "lr_scheduler_type: expected one of constant, .* got 'exp'"),
        ({"report_to": "excel"}, "report_to: expected one of aim, .*wandb, got 'excel'"),
        ({"leaning_rate": 1e-4}, "leaning_rate: no such setting"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both set"),
        (
            {"overwrite_output_dir": True, "resume_from_checkpoint": "auto"},
            "are both set: keep one",
        ),
        ({"seed": -1}, "seed: greater than or equal to 0"),
    ],
)
def test_bad_setting_says_what_is_wrong(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_several_bad_settings_are_named_together():
    with pytest.raises(ConfigError, match=r"learning_rate.*; optim"):
        TrainConfig(learning_rate=-1, optim="sgd")


def test_settings_of_the_tutorials_are_known():
    TrainConfig(
        output_dir="results",
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="paged_adamw_32bit",
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.03,
        weight_decay=0.001,
        max_grad_norm=0.3,
        max_steps=-1,
        fp16=False,
        bf16=False,
        logging_strategy="steps",
        logging_steps=25,
        eval_strategy="steps",
        eval_steps=0.2,
        save_strategy="epoch",
        save_steps=25,
        report_to="tensorboard",
    )


def test_settings_cannot_change_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().learning_rate = 1.0


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        ({"num_train_epochs": 3}, 36),
        ({"num_train_epochs": 0.5}, 6),
        ({"num_train_epochs": 1.01}, 13),
        ({"max_steps": 5}, 5),
        ({"max_steps": 100}, 100),
    ],
)
def test_steps_of_a_run(settings, total):
    assert TrainConfig(**settings).total_steps(steps_per_epoch=12) == total


@pytest.mark.parametrize(("every", "steps"), [(10, 10), (0.2, 20), (0.001, 1), (1, 1), (1e3, 1000)])
def test_shares_become_steps_as_in_transformers(every, steps):
    assert steps_between(every, 100) == steps


@pytest.mark.parametrize(
    ("given", "kept"),
    [(True, "auto"), (False, None), ("auto", "auto"), ("out/x", "out/x"), (None, None)],
)
def test_resume_takes_truth_values_too(given, kept):
    assert TrainConfig(resume_from_checkpoint=given).resume_from_checkpoint == kept


@pytest.mark.parametrize(
    ("given", "kept"), [("none", ()), (None, ()), ("wandb", ("wandb",)), (["none"], ())]
)
def test_trackers_are_one_or_several_or_none(given, kept):
    assert TrainConfig(report_to=given).report_to == kept


def test_every_setting_has_a_description():
    undescribed = [n for n, field in TrainConfig.model_fields.items() if not field.description]
    assert undescribed == []


def test_survives_json():
    config = TrainConfig(report_to=["wandb"], save_steps=0.5, lr_scheduler_kwargs={"num_cycles": 1})
    assert TrainConfig(**config.model_dump(mode="json")) == config


def test_errors_inside_a_larger_configuration_keep_their_words():
    class Whole(BaseModel):
        train: TrainConfig

    with pytest.raises(ValueError, match=r"learning_rate: greater than 0, got -1"):
        Whole(train={"learning_rate": -1})


@pytest.mark.parametrize(
    ("given", "activations"),
    [("lean", "lean"), ("6GiB", 6 * 2**30), (1.5, 3 * 2**29), (2, 2**31), ("512MiB", 2**29)],
)
def test_memory_is_a_mode_or_a_size_and_numbers_are_gib(given, activations):
    config = TrainConfig(memory=given)
    assert config.activations == activations
    assert TrainConfig(**config.model_dump()).activations == activations
