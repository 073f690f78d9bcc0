"""How to train, as settings: the names and meanings of transformers' TrainingArguments.

Every field is also a `key=value` on the command line. Nothing here touches a model or a disk.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from halfbyte.errors import ConfigError
from halfbyte.optim.names import OPTIMIZERS
from halfbyte.optim.schedule import SCHEDULES
from halfbyte.plan.cards import parse_size

When = Literal["no", "steps", "epoch"]
Compute = Literal["bf16", "fp8"]
_MODES = ("auto", "lean", "fast")
TRACKERS = (
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)


class TrainConfig(BaseModel):
    """One training run. A setting that is unknown or out of range is a ConfigError."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    output_dir: str = "out"
    """Where adapter, checkpoints and metrics go."""
    overwrite_output_dir: bool = False
    """Remove an earlier run from `output_dir` first."""

    num_train_epochs: float = Field(default=3.0, gt=0)
    """How often every row is seen; fractions are fine."""
    max_steps: int = -1
    """Optimizer steps, instead of `num_train_epochs`; -1 leaves it to the epochs."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Rows (with packing: packed sequences) in one forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes in one optimizer step."""
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    """Rows in one forward pass of an evaluation."""

    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Peak learning rate."""
    lr_scheduler_type: str = "cosine"
    """constant, constant_with_warmup, cosine, cosine_with_min_lr or linear."""
    lr_scheduler_kwargs: dict[str, float] = Field(default_factory=dict)
    """`min_lr` or `min_lr_rate` of cosine_with_min_lr, `num_cycles` of the cosines."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of all steps that warm up, where `warmup_steps` is 0."""
    warmup_steps: float = Field(default=0, ge=0)
    """Steps that warm up; below 1 a share of all steps."""

    optim: str = "paged_adamw_32bit"
    """The optimizer: AdamW with 32-bit or 8-bit state, paged or not."""
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decoupled decay of matrices; biases and norms are left alone."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Longer gradients are scaled down to this norm; 0 means never."""
    max_skipped_steps: int = Field(default=0, ge=0)
    """Steps with a NaN or Inf in loss or gradient that are left out before the run stops."""

    memory: str = "auto"
    """On a GPU, what saved activations may take: `auto` what is free, `lean` the least (inputs of
    layers and the optimizer's state in host memory), `fast` all there are; or a size: `6GiB`."""
    compute: Compute = "bf16"
    """`fp8`: fused layers multiply in eight bits, which is faster and not QLoRA's arithmetic; needs
    a GPU of compute capability 8.9 or more. `bf16`: in the model's own 16 bits."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Passed to torch's checkpointing, which is never the reentrant one."""
    bf16: bool | None = None
    """Expect bf16. The model's dtype is chosen when it is loaded; a note says if it is another."""
    fp16: bool | None = None
    """Expect float16, in the same way."""

    logging_strategy: When = "steps"
    """When metrics are recorded."""
    logging_steps: float = Field(default=1, gt=0)
    """Steps between two records; below 1 a share of all steps."""
    eval_strategy: When = "steps"
    """When the held-out rows are evaluated; unless it is `no`, also at the end."""
    eval_steps: float | None = Field(default=None, gt=0)
    """Steps between two evaluations; below 1 a share of all steps; by default only at the end."""
    eval_on_start: bool = False
    """Evaluate before the first step too."""
    save_strategy: When = "steps"
    """When checkpoints are saved; the adapter is saved at the end in any case."""
    save_steps: float = Field(default=500, gt=0)
    """Steps between two checkpoints; below 1 a share of all steps."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Keep only that many checkpoints, the newest ones."""
    resume_from_checkpoint: str | bool | None = None
    """`auto` (or true): go on from the newest valid checkpoint; or the path of one."""
    resume_with_changes: bool = False
    """Resume although the data, the base model, the adapters or the settings changed."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Decides the order of rows and the dropout masks."""
    deterministic: bool = False
    """Use only deterministic kernels: the same bits from run to run on one machine."""

    report_to: tuple[str, ...] = ()
    """Experiment trackers: tensorboard, wandb, trackio, mlflow, ..., or none."""
    run_name: str | None = None
    """What trackers call this run; by default the name of `output_dir`."""
    disable_tqdm: bool = False
    """Show no progress."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _config_error(error) from error

    @field_validator("max_steps")
    @classmethod
    def _positive_or_unset(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("expected at least 1, or -1 to train for num_train_epochs")
        return value

    @field_validator("lr_scheduler_type")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        return _one_of(value, SCHEDULES)

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str) -> str:
        return _one_of(value, OPTIMIZERS)

    @field_validator("warmup_steps", "logging_steps", "eval_steps", "save_steps")
    @classmethod
    def _whole_or_share(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("expected a whole number of steps, or a share below 1")
        return value

    @field_validator("memory", mode="before")
    @classmethod
    def _mode_or_size(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value}GiB"
        if isinstance(value, str) and value not in _MODES:
            try:
                parse_size(value)
            except ConfigError as error:
                raise ValueError(f"{', '.join(_MODES)}, or a size such as 6GiB") from error
        return value

    @field_validator("resume_from_checkpoint")
    @classmethod
    def _resume_by_name(cls, value: Any) -> str | None:
        if isinstance(value, bool):
            return "auto" if value else None
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> tuple[str, ...]:
        names = (value,) if isinstance(value, str) else tuple(value or ())
        return tuple(_one_of(name, TRACKERS) for name in names if name != "none")

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both set: keep one")
        if self.warmup_steps > self.max_steps >= 1:
            raise ValueError(
                f"warmup_steps {self.warmup_steps:g} is more than max_steps {self.max_steps}"
            )
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError(
                "overwrite_output_dir and resume_from_checkpoint are both set: keep one"
            )
        return self

    @property
    def activations(self) -> str | int:
        """`memory` as the engine takes it: a mode, or bytes."""
        return self.memory if self.memory in _MODES else parse_size(self.memory)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of the run.

        Raises:
            ConfigError: the warmup is longer than that.
        """
        if self.max_steps > 0:
            total = self.max_steps
        else:
            total = math.ceil(self.num_train_epochs * steps_per_epoch)
        if self.warmup_steps > total:
            raise ConfigError(
                f"warmup_steps {self.warmup_steps:g} is more than the run's {total} steps",
                hint="give warmup_ratio, or a warmup_steps below 1: a share of all steps",
            )
        return total


def steps_between(every: float, total_steps: int) -> int:
    """Return `every` in steps: it is a number of steps, or below 1 a share of `total_steps`."""
    return int(every) if every >= 1 else max(1, math.ceil(every * total_steps))


def _one_of(value: str, known: tuple[str, ...] | Mapping[str, Any]) -> str:
    if value not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return value


def _config_error(error: ValidationError) -> ConfigError:
    """Return pydantic's findings as one of our errors, a line each."""
    lines = []
    for finding in error.errors():
        name = ".".join(str(part) for part in finding["loc"])
        message = finding["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        if finding["type"] == "extra_forbidden":
            message = "no such setting"
        lines.append(f"{name}: {message}, got {finding['input']!r}" if name else message)
    return ConfigError(
        "training settings: " + "; ".join(lines),
        hint="`halfbyte train --help` lists all settings",
    )
