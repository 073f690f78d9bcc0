"""train(): set up, and then for every step: batches, update, evaluate, save.

The loop is flat and holds no state of its own. Which rows, which learning rate and which dropout
masks belong to a step are pure functions of its number; what changes is the model, the optimizer
and `Progress`.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from halfbyte.adapters.io import restore_adapter
from halfbyte.errors import CheckpointError, ConfigError, HalfbyteError
from halfbyte.optim.schedule import learning_rate
from halfbyte.train.ahead import Ahead
from halfbyte.train.config import TrainConfig
from halfbyte.train.determinism import determinism
from halfbyte.train.directory import (
    RUN_FILE,
    claim,
    clear,
    locked,
    refuse_taken,
    remove_leftovers,
    write_json,
)
from halfbyte.train.evaluate import evaluate_rows
from halfbyte.train.events import (
    Evaluated,
    Listener,
    Notice,
    StepFinished,
    StepSkipped,
    TrainingFinished,
    TrainingStopped,
    TrainResult,
)
from halfbyte.train.gradients import NonFiniteError, StepResult
from halfbyte.train.inputs import Data
from halfbyte.train.memory import memory_fields, rehearse, result_fields
from halfbyte.train.result import describe_run, finished_result, write_result
from halfbyte.train.run import Run, announce, assemble, restore
from halfbyte.train.signals import Interrupted, Interruption
from halfbyte.train.writer import CheckpointWriter


def train(
    model: nn.Module,
    tokenizer: Any,
    data: Data,
    config: TrainConfig | None = None,
    *,
    eval_data: Data | None = None,
    listeners: Sequence[Listener] = (),
) -> TrainResult:
    """Train the model's adapters on `data` and save them in `config.output_dir`.

    Args:
        model: A peft model, as `add_lora` or peft's `get_peft_model` return it.
        tokenizer: Its tokenizer; saved beside the adapter.
        data: A path or hub name, a DataConfig, rows (a list or Dataset), or a Dataset that is
            tokenized already (`input_ids` and `labels`).
        config: How to train.
        eval_data: Held-out rows, in the same forms; without it, what `data` says.
        listeners: Called with every event of the run (halfbyte.train.events).

    Raises:
        ConfigError: there are no adapters, the settings do not fit the run or the directory.
        DataError: the data cannot be read, or would not train anything.
        CheckpointError: the directory is gone, or at the end the disk does not take the result.
        TrainingError: loss or gradient is not finite; checkpoints are as they were.
        Interrupted: a signal came; the step was finished and a checkpoint saved.
    """
    config = config or TrainConfig()
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"expected a model with adapters, got a plain {type(model).__name__}",
            hint="model = halfbyte.add_lora(model, halfbyte.LoraConfig(r=16))",
        )
    with determinism(enabled=config.deterministic):
        overwrite, resume = config.overwrite_output_dir, config.resume_from_checkpoint is not None
        refuse_taken(Path(config.output_dir), overwrite=overwrite, resume=resume)
        run = assemble(model, tokenizer, data, eval_data, config)
        try:
            with locked(run.output_dir), _telling_why(run):
                claim(run.output_dir, overwrite=overwrite, resume=resume)
                return _train(run, listeners)
        finally:
            run.optimizer.release()
            model.eval()


@contextlib.contextmanager
def _telling_why(run: Run) -> Iterator[None]:
    """Tell the listeners of the error that ends the run, whatever becomes of the telling."""
    try:
        yield
    except BaseException as error:
        reason = error.message if isinstance(error, HalfbyteError) else str(error) or repr(error)
        with contextlib.suppress(HalfbyteError):
            run.tell(TrainingStopped(reason))
        raise


def _train(run: Run, listeners: Sequence[Listener]) -> TrainResult:
    """Return the result that is there already, or make it."""
    config, output_dir = run.config, run.output_dir
    remove_leftovers(output_dir)
    if config.resume_from_checkpoint == "auto":
        result = finished_result(output_dir, run.identity)
        if result is not None:
            restore_adapter(run.model, output_dir, adapter=run.model.active_adapter)
            return result
    if config.overwrite_output_dir:
        clear(output_dir)
    return _do_steps(run, listeners)


def _do_steps(run: Run, listeners: Sequence[Listener]) -> TrainResult:
    """Resume where that is asked for, do the remaining steps, and write the result."""
    config = run.config
    announce(run, listeners, restore(run))
    description = describe_run(run.model, run.inputs, config, run.identity)
    write_json(run.output_dir / RUN_FILE, description)
    if run.device.type == "cuda":
        run.tell(rehearse(run.steps, run.plan, config))
    with _writer(run) as writer, Interruption() as interruption:
        if config.eval_on_start and run.progress.step == 0:
            _evaluate(run, interruption)
        ahead = Ahead(
            lambda step: run.plan.step(*divmod(step, len(run.plan))),
            num_steps=run.total_steps,
            begins=functools.partial(_may_begin, run),
        )
        while run.progress.step < run.total_steps:
            _step(run, ahead)
            if run.evaluates(run.progress.step) and not _is_last(run):
                _evaluate(run, interruption)
            stop = interruption.signum
            if stop is not None or run.saves(run.progress.step):
                _tell_saved(run, writer, wait=True)
                writer.save(run.progress)
            if stop is not None and not _is_last(run):
                _tell_saved(run, writer, wait=True, must=True)
                raise Interrupted(stop, run.progress.step, run.output_dir)
            _tell_saved(run, writer)
        eval_loss = None if config.eval_strategy == "no" else _evaluate(run, interruption)
        _tell_saved(run, writer, wait=True)
        result = _result(run, eval_loss)
        write_result(run.model, run.tokenizer, run.inputs, description, result)
    run.tell(TrainingFinished(result))
    return result


def _step(run: Run, ahead: Ahead) -> None:
    """Do the next optimizer step, or leave it out where it is not finite and that is allowed."""
    start = time.perf_counter()
    step = run.progress.step
    rate = learning_rate(step, run.total_steps, run.config)
    try:
        result = run.steps.step(
            ahead.batches(step),
            step=step,
            learning_rate=rate,
            max_grad_norm=run.config.max_grad_norm,
            seed=run.config.seed,
            ahead=ahead,
        )
    except NonFiniteError as error:
        if run.progress.skipped_steps >= run.config.max_skipped_steps:
            raise
        _skip(run, error, time.perf_counter() - start)
    else:
        _advance(run, result, rate, time.perf_counter() - start)


def _skip(run: Run, error: NonFiniteError, seconds: float) -> None:
    run.progress = run.progress.after_skip(seconds)
    run.tell(
        StepSkipped(
            step=run.progress.step,
            reason=error.what,
            rows=error.rows,
            skipped_steps=run.progress.skipped_steps,
            max_skipped_steps=run.config.max_skipped_steps,
        )
    )


def _advance(run: Run, result: StepResult, rate: float, seconds: float) -> None:
    after = run.progress.after(result, seconds)
    run.progress = dataclasses.replace(after, max_tokens=run.steps.max_tokens)
    run.tell(
        StepFinished(
            step=run.progress.step,
            total_steps=run.total_steps,
            epoch=run.epoch,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            supervised_tokens=result.supervised_tokens,
            tokens=result.tokens,
            seconds=seconds,
            **memory_fields(run.model, run.optimizer),
        )
    )


def _evaluate(run: Run, interruption: Interruption) -> float | None:
    """Evaluate the held-out rows, where there are any and no signal asks to stop."""
    if run.inputs.eval is None:
        return None
    start = time.perf_counter()
    result = evaluate_rows(
        run.steps.model.in_bf16(),
        run.inputs.eval,
        batch_size=run.config.per_device_eval_batch_size,
        pad_token_id=run.pad_token_id,
        should_stop=lambda: interruption.requested,
    )
    if result is None:
        return None
    seconds = time.perf_counter() - start
    step = run.progress.step
    run.tell(Evaluated(step, run.epoch, result.loss, result.perplexity, result.tokens, seconds))
    return result.loss


def _writer(run: Run) -> CheckpointWriter:
    return CheckpointWriter(
        run.output_dir,
        run.model,
        run.optimizer,
        run.identity,
        steps_per_epoch=len(run.plan),
        limit=run.config.save_total_limit,
    )


def _tell_saved(
    run: Run, writer: CheckpointWriter, *, wait: bool = False, must: bool = False
) -> None:
    """Tell of the checkpoint whose writing ended.

    A disk that does not take it is no reason to throw the training away: the next save tries again.

    Args:
        run: The run.
        writer: Its writer.
        wait: For the write in flight.
        must: There is no next save: an error is an error.
    """
    try:
        saved = writer.finished(wait=wait)
    except CheckpointError as error:
        if must or not run.output_dir.is_dir():
            raise
        run.tell(Notice(f"{error.message}; training goes on, and the next save tries again"))
    else:
        if saved is not None:
            run.tell(saved)


def _may_begin(run: Run, step: int) -> bool:
    """Whether a step, from 0, may be queued before the one before it is waited for.

    Not where something comes in between, which it would hold up.
    """
    return run.device.type == "cuda" and not (run.evaluates(step) or run.saves(step))


def _is_last(run: Run) -> bool:
    return run.progress.step >= run.total_steps


def _result(run: Run, eval_loss: float | None) -> TrainResult:
    progress = run.progress
    return TrainResult(
        steps=progress.step,
        loss=progress.loss_total / max(progress.supervised_tokens, 1),
        eval_loss=eval_loss,
        seconds=progress.seconds,
        tokens=progress.tokens,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds > 0 else 0.0,
        output_dir=run.output_dir,
        **result_fields(run.model, run.optimizer),
    )
