"""The demonstration: score, fine-tune in four bits, score again, compare with 16 bits, merge, talk.

Everything goes through the public pieces that a user would call, in the order of the README. What
was measured is printed and kept in summary.json.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.adapters.inject import add_lora
from halfbyte.data.config import DataConfig
from halfbyte.demo.base import base_path
from halfbyte.demo.task import make_task, write_task
from halfbyte.device import peak_rss_bytes
from halfbyte.export.merge import merge
from halfbyte.generate.score import ScoreResult, exact_match
from halfbyte.models.load import load
from halfbyte.quant.config import NF4Config
from halfbyte.train.config import TrainConfig
from halfbyte.train.evaluate import evaluate
from halfbyte.train.events import TrainResult
from halfbyte.train.loop import train

Rows = list[dict[str, list[dict[str, str]]]]

# Chosen for a minute of training on two cores; the held-out rows only measure.
LORA: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "seed": 0}
TRAINING: Mapping[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,  # packed sequences, of two or three questions each
    "learning_rate": 3e-3,
    "warmup_ratio": 0.05,
    "lr_scheduler_type": "cosine",
    "optim": "paged_adamw_32bit",
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 10,
    "overwrite_output_dir": True,
}
PACKED_LENGTH = 128
# torch's fused attention for CPUs takes several times as long backwards on sequences this short.
ATTENTION = "eager"
_SAMPLES = (0, 70, 140)  # held-out questions that are shown


@dataclass(frozen=True)
class Summary:
    """What the demonstration measured.

    Attributes:
        exact_match_before: Share (0 to 1) of held-out questions that the 4-bit base answers right.
        exact_match_after: The same with the adapter that was trained on the 4-bit base.
        exact_match_16bit: The same for an adapter trained, and scored, on the 16-bit base.
        exact_match_merged: The same for the first adapter, merged into a plain checkpoint.
        eval_loss_before: Mean held-out loss of the 4-bit base, in nats a supervised token.
        eval_loss_after: The same with its adapter.
        eval_loss_16bit: The same for the adapter on the 16-bit base.
        eval_loss_merged: The same for the merged model.
        train_seconds: Time in training steps, on the 4-bit base.
        train_seconds_16bit: The same on the 16-bit base.
        train_tokens_per_second: Real tokens a second, on the 4-bit base.
        seconds_total: The whole demonstration, without Python's start.
        peak_rss_bytes: Largest resident set of the process.
        adapter: Folder of the adapter that was trained on the 4-bit base.
        merged: Folder of the merged model.
    """

    exact_match_before: float
    exact_match_after: float
    exact_match_16bit: float
    exact_match_merged: float
    eval_loss_before: float
    eval_loss_after: float
    eval_loss_16bit: float
    eval_loss_merged: float
    train_rows: int
    held_out_rows: int
    train_seconds: float
    train_seconds_16bit: float
    train_tokens_per_second: float
    seconds_total: float
    peak_rss_bytes: int
    adapter: str
    merged: str


@dataclass(frozen=True)
class _Measured:
    """What the held-out rows say of a model."""

    score: ScoreResult
    loss: float


@dataclass(frozen=True)
class _Stage:
    """The rows, where things go, and where progress is printed."""

    data: DataConfig
    held_out: Rows
    folder: Path
    console: Console

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, who: str
    ) -> _Measured:
        """Answer the held-out questions, and say how many answers are right to the letter."""
        start = time.perf_counter()
        score = exact_match(model, tokenizer, self.held_out, batch_size=100, max_new_tokens=48)
        loss = evaluate(model, tokenizer, self.data, batch_size=50).loss
        right, seconds = round(score.exact_match * score.total), time.perf_counter() - start
        self.console.print(
            f"{who}: {right} of {score.total} held-out questions right, loss {loss:.4f} "
            f"({seconds:.0f} s)"
        )
        return _Measured(score, loss)

    def finetune(self, quant: NF4Config | None, name: str) -> tuple[TrainResult, _Measured]:
        """Load the base, train an adapter into the folder `name`, and measure it."""
        model, tokenizer = load(base_path(), quant=quant, attn_implementation=ATTENTION)
        adapted = add_lora(model, **LORA)
        config = TrainConfig(output_dir=str(self.folder / name), **TRAINING)
        result = train(adapted, tokenizer, self.data, config)
        return result, self.measure(model, tokenizer, f"base + adapter ({name})")


def run_demo(output_dir: str | Path = "runs/demo", *, console: Console | None = None) -> Summary:
    """Fine-tune the embedded base on the embedded task, and measure what that changed.

    Args:
        output_dir: Gets the task's rows, both adapters, the merged model and summary.json.
        console: Where results are printed; stdout by default.

    Raises:
        HalfbyteError: a part of it failed, for example because `output_dir` cannot be written.
    """
    console = console or Console(highlight=False)
    start, folder, task = time.perf_counter(), Path(output_dir), make_task()
    train_path, held_out_path = write_task(folder / "task", task)
    stage = _Stage(
        data=DataConfig(
            path=str(train_path),
            eval_path=str(held_out_path),
            packing=True,
            max_length=PACKED_LENGTH,
            cache_dir=str(folder / "cache"),
        ),
        held_out=[_conversation(question.row) for question in task.held_out],
        folder=folder,
        console=console,
    )
    console.print(
        f"The task: English to SQL. {len(task.train)} rows to train on and {len(task.held_out)} "
        f"held-out ones, for example:\n  {task.train[0].prompt}\n  {task.train[0].completion}"
    )
    console.rule("The base, in 4 bits", align="left")
    model, tokenizer = load(base_path())
    before = stage.measure(model, tokenizer, "base")
    console.rule("QLoRA: adapters on the 4-bit base", align="left")
    qlora, after = stage.finetune(NF4Config(), "qlora")
    console.rule("For comparison: adapters on the 16-bit base", align="left")
    lora, after_16bit = stage.finetune(None, "lora-16bit")
    console.rule("QLoRA's adapter, merged", align="left")
    merge(folder / "qlora", folder / "merged", overwrite=True)
    model, tokenizer = load(folder / "merged", quant=None)
    merged = stage.measure(model, tokenizer, "merged model")

    summary = Summary(
        exact_match_before=before.score.exact_match,
        exact_match_after=after.score.exact_match,
        exact_match_16bit=after_16bit.score.exact_match,
        exact_match_merged=merged.score.exact_match,
        eval_loss_before=before.loss,
        eval_loss_after=after.loss,
        eval_loss_16bit=after_16bit.loss,
        eval_loss_merged=merged.loss,
        train_rows=len(task.train),
        held_out_rows=len(task.held_out),
        train_seconds=qlora.seconds,
        train_seconds_16bit=lora.seconds,
        train_tokens_per_second=qlora.tokens_per_second,
        seconds_total=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
        adapter=str(folder / "qlora"),
        merged=str(folder / "merged"),
    )
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    console.rule("Before and after", align="left")
    for index in _SAMPLES:
        answers = before.score.samples[index].answer, merged.score.samples[index].answer
        _show_sample(console, task.held_out[index].prompt, *answers)
    _show_figures(console, summary)
    return summary


def _conversation(row: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """Return a prompt and its completion as the two turns that training makes of them."""
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }


def _show_sample(console: Console, question: str, before: str, after: str) -> None:
    """Print a held-out question with the base's answer and the merged model's."""
    for name, text in (("question", question), ("before", before), ("after", after)):
        line = " ".join(text.split())
        console.print(f"{name:9} {line}", markup=False, soft_wrap=True)


def _show_figures(console: Console, summary: Summary) -> None:
    """Print what was measured as a table."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "exact match", "loss", "seconds of training"):
        table.add_column(name, justify="left" if not name else "right")
    s = summary
    table.add_row("4-bit base", f"{s.exact_match_before:.1%}", f"{s.eval_loss_before:.3f}", "")
    table.add_row(
        "QLoRA, on 4 bits",
        f"{s.exact_match_after:.1%}",
        f"{s.eval_loss_after:.3f}",
        f"{s.train_seconds:.0f}",
    )
    table.add_row(
        "LoRA, on 16 bits",
        f"{s.exact_match_16bit:.1%}",
        f"{s.eval_loss_16bit:.3f}",
        f"{s.train_seconds_16bit:.0f}",
    )
    table.add_row("QLoRA, merged", f"{s.exact_match_merged:.1%}", f"{s.eval_loss_merged:.3f}", "")
    console.print(table)
    console.print(
        f"{s.seconds_total:.0f} s in all, {s.peak_rss_bytes / 2**20:.0f} MiB at the peak; "
        f"adapter in {s.adapter}, merged model in {s.merged}\n"
        f"talk to it: halfbyte chat {s.merged}"
    )
