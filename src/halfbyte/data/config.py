"""What to train on, as settings.

The names are those of the configuration file; every field is also a `key=value` on the command
line. Nothing here touches a disk: `halfbyte.data.prepare` does.
"""

import os
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]
LossOn = Literal["assistant", "completion", "all"]
Allowable = Literal["unreadable_rows", "nothing_supervised", "no_stop"]
OverLength = Literal["error", "truncate", "split", "drop"]


class DataConfig(BaseModel):
    """Which rows are read, how they become tokens, and which of those tokens are learned."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: str | None = None
    """A file (JSONL, JSON, Parquet, CSV, TSV, text), a folder, a glob, or a data set on the hub."""
    name: str | None = None
    """The hub data set's configuration, where it has several."""
    split: str | None = None
    """Which rows: `train`, `train_sft[:5000]`, `train[:1%]`; slices work on local files too."""
    eval_path: str | None = None
    """Held-out rows: a file, folder, glob or hub name."""
    eval_split: str | None = None
    """Which rows of `eval_path` (or, without it, of `path`) are held out."""
    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Hold out this share of the training rows, chosen by the seed."""
    format: Format = "auto"
    """How a row is laid out; `auto` decides by its columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Role to column, for other names: `{prompt: question, completion: answer}`."""
    chat_template: str | None = None
    """A name (`chatml`, `zephyr`, ...), a file or Jinja text; by default the tokenizer's own."""
    loss_on: LossOn = "assistant"
    """Learn every assistant turn, only the last one (`completion`), or every token (`all`)."""
    max_length: int = Field(default=1024, ge=2)
    """The longest sequence, in tokens."""
    over_length: OverLength = "error"
    """What happens to longer rows; `split` cuts them into windows of `max_length`."""
    packing: bool = False
    """Put several rows into one sequence; they never see each other."""
    system_prompt: str | None = None
    """Put before conversations that have no system message of their own."""
    allow: tuple[Allowable, ...] = ()
    """Findings that shall not stop the run: unreadable_rows, nothing_supervised, no_stop."""
    num_proc: int | None = Field(default=None, ge=1)
    """Processes that tokenize; by default the cores, or one where the data are few."""
    cache_dir: str | None = None
    """Where tokenized data are kept; by default beside the `datasets` cache."""
    shuffle: bool = True
    """Draw a new order every epoch."""

    @field_validator("path", "eval_path", "cache_dir", mode="before")
    @classmethod
    def _path_as_text(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _one_source_of_held_out_rows(self) -> Self:
        if self.eval_fraction and (self.eval_path or self.eval_split):
            raise ValueError(
                "eval_fraction and eval_path or eval_split both name the held-out rows: keep one"
            )
        return self
