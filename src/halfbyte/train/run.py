"""A run's parts, put together: data, plan, optimizer, identity, and how far it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from halfbyte.data.loader import BatchPlan
from halfbyte.engine.body import FusedBody
from halfbyte.errors import ConfigError
from halfbyte.memory.activations import checkpoint_activations
from halfbyte.memory.pages import Placement
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.names import OPTIMIZERS
from halfbyte.train.adapter_norms import AdapterProbe
from halfbyte.train.config import TrainConfig, When, steps_between
from halfbyte.train.directory import METRICS_FILE, checkpoints
from halfbyte.train.display import make_display
from halfbyte.train.events import Event, Listener, Notice, TrainingStarted
from halfbyte.train.health import HealthMonitor
from halfbyte.train.identity import identify, require_same
from halfbyte.train.inputs import Data, Inputs, pad_token_id, prepare_inputs, require_fitting
from halfbyte.train.loss import LanguageModel
from halfbyte.train.memory import explain
from halfbyte.train.metrics import Averaged, MetricsFile
from halfbyte.train.packing import prove_packing
from halfbyte.train.state import Progress, find_checkpoint, load_checkpoint
from halfbyte.train.survive import Survivor
from halfbyte.train.trackers import make_trackers


@dataclass
class Run:
    """Everything that the loop needs.

    Attributes:
        steps: Does them; has the model, taken apart for its loss, and the optimizer.
        total_steps: Optimizer steps from the first to the last.
        identity: What must be the same to resume.
        progress: How far the run is; the loop replaces it after each step.
    """

    model: PeftModel
    steps: Survivor
    tokenizer: Any
    config: TrainConfig
    inputs: Inputs
    plan: BatchPlan
    total_steps: int
    identity: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    listeners: list[Listener] = field(default_factory=list)

    @property
    def optimizer(self) -> AdamW:
        """Holds the adapters' values, gradients and moments."""
        return self.steps.optimizer

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.config.output_dir)

    @property
    def device(self) -> torch.device:
        """Where the first layer is."""
        return self.model.device

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.progress.step / len(self.plan)

    @property
    def pad_token_id(self) -> int:
        """What batches are filled with."""
        return pad_token_id(self.tokenizer)

    def tell(self, event: Event) -> None:
        """Pass an event to every listener."""
        for listener in self.listeners:
            listener(event)

    def note(self, message: str) -> None:
        """Tell the user something, once."""
        self.tell(Notice(message))

    def steps_between(self, strategy: When, every: float | None) -> int:
        """Return a strategy's distance in steps, 0 for never."""
        if strategy == "epoch":
            return len(self.plan)
        return 0 if strategy == "no" or every is None else steps_between(every, self.total_steps)

    def is_due(self, strategy: When, every: float | None, step: int) -> bool:
        """Whether something is to be done after so many steps."""
        distance = self.steps_between(strategy, every)
        return distance > 0 and step % distance == 0

    def evaluates(self, step: int) -> bool:
        """Whether the held-out rows are to be evaluated after so many steps."""
        return self.is_due(self.config.eval_strategy, self.config.eval_steps, step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is to be written after so many steps."""
        return self.is_due(self.config.save_strategy, self.config.save_steps, step)


def assemble(
    model: PeftModel, tokenizer: Any, data: Data, eval_data: Data | None, config: TrainConfig
) -> Run:
    """Prepare the data and build everything around the model.

    Raises:
        ConfigError: nothing of the model can be trained, or the settings do not fit the data.
        DataError: the data cannot be read, or would not train anything.
    """
    inputs = prepare_inputs(data, eval_data, tokenizer, seed=config.seed)
    for rows in filter(None, (inputs.train, inputs.eval)):
        require_fitting(rows, model)
    plan = BatchPlan(
        inputs.train,
        batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        packing=inputs.packing,
        max_length=inputs.max_length,
        seed=config.seed,
        pad_token_id=pad_token_id(tokenizer),
        shuffle=inputs.shuffle,
    )
    total_steps = config.total_steps(len(plan))
    if config.gradient_checkpointing:
        checkpoint_activations(model, config.gradient_checkpointing_kwargs)
    memory = "lean" if config.gradient_checkpointing else config.activations
    parts = LanguageModel.of(model, memory=memory, compute=config.compute)
    steps = Survivor(
        parts,
        AdamW(
            model.named_parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            state_bits=OPTIMIZERS[config.optim][0],
            placement=_placement(config, parts),
        ),
        tell=lambda event: run.tell(event),
        explain=lambda shortage: explain(shortage, model, config, plan),
    )
    run = Run(
        model=model,
        steps=steps,
        tokenizer=tokenizer,
        config=config,
        inputs=inputs,
        plan=plan,
        total_steps=total_steps,
        identity=identify(model, inputs, plan, config, total_steps),
    )
    return run


def _placement(config: TrainConfig, parts: LanguageModel) -> Placement:
    """Return where the optimizer's state is: where the least memory is wanted, on the host."""
    if not OPTIMIZERS[config.optim][1]:
        return "device"
    is_lean = isinstance(parts.body, FusedBody) and parts.body.memory == "lean"
    return "host" if is_lean else "auto"


def restore(run: Run) -> list[Notice]:
    """Go to where the run to resume was, and return what the user should know about it.

    Raises:
        CheckpointError: the checkpoint asked for cannot be used.
        ConfigError: it belongs to another run.
    """
    config = run.config
    if config.resume_from_checkpoint is None:
        return []
    saved, skipped = find_checkpoint(run.output_dir, str(config.resume_from_checkpoint))
    notices = [Notice(line) for line in skipped]
    if saved is None:
        return [
            *notices,
            Notice(f"nothing to resume in {run.output_dir}: starting from the first step"),
        ]
    _refuse_newer(run.output_dir, saved.progress.step, str(config.resume_from_checkpoint))
    changes = require_same(saved.identity, run.identity, allowed=config.resume_with_changes)
    load_checkpoint(saved, run.model, run.optimizer)
    run.progress = saved.progress
    run.steps.max_tokens = saved.progress.max_tokens
    return notices + [Notice(f"resumed with a change: {line}") for line in changes]


def _refuse_newer(output_dir: Path, step: int, resume: str) -> None:
    """Find checkpoints that the resumed run would leave behind as if they were its own future.

    Raises:
        ConfigError: there are some; `auto` may pass over damaged ones, which it then replaces.
    """
    newer = [path.name for saved, path in checkpoints(output_dir) if saved > step]
    if newer and resume != "auto":
        raise ConfigError(
            f"{output_dir} holds checkpoints after step {step}: {', '.join(newer)}",
            hint="remove them to go on from the older one, or choose another output_dir",
        )


def announce(run: Run, listeners: Sequence[Listener], notices: Sequence[Notice]) -> None:
    """Make the run's own listeners and tell all that it starts."""
    config, first_step = run.config, run.progress.step
    log_every = run.steps_between(config.logging_strategy, config.logging_steps)
    run_name = config.run_name or run.output_dir.resolve().name
    metrics = MetricsFile(run.output_dir / METRICS_FILE, first_step=first_step, warn=run.note)
    recorders: list[Listener] = [metrics, *make_trackers(config, run_name, run.note)]
    run.listeners = [Averaged(log_every, recorder) for recorder in recorders]
    if not config.disable_tqdm:
        run.listeners.append(make_display(log_every=log_every))
    run.listeners += listeners
    monitor = HealthMonitor(
        config,
        run.optimizer.num_parameters,
        AdapterProbe(run.model),
        log_every=log_every,
        tell=run.tell,
    )
    run.listeners.append(monitor)  # the last: what it tells comes after the step that it saw
    run.tell(
        TrainingStarted(
            output_dir=run.output_dir,
            first_step=first_step,
            total_steps=run.total_steps,
            steps_per_epoch=len(run.plan),
            train_rows=len(run.inputs.train),
            eval_rows=len(run.inputs.eval) if run.inputs.eval is not None else 0,
            trainable_parameters=run.optimizer.num_parameters,
            total_parameters=run.model.num_parameters(),
            data=run.inputs.summary,
            settings=config.model_dump(),
        )
    )
    for notice in (*notices, *_precision_notices(run), *_packing_notices(run)):
        run.tell(notice)


def _packing_notices(run: Run) -> list[Notice]:
    return [Notice(prove_packing(run.steps.model))] if run.inputs.packing else []


def _precision_notices(run: Run) -> list[Notice]:
    wanted = torch.bfloat16 if run.config.bf16 else torch.float16 if run.config.fp16 else None
    notices = []
    if wanted is not None and run.model.dtype != wanted:
        dtype = run.model.dtype
        notices.append(f"the model was loaded for {dtype}, and trains in that, not in {wanted}")
    if run.steps.model.is_fp8:
        notices.append(
            "compute: fp8: training multiplies layers in eight bits, which is not QLoRA's "
            "arithmetic; evaluation and the saved adapter are as ever (docs/fp8.md)"
        )
    return [Notice(notice) for notice in notices]
