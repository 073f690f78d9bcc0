"""What a run knows of its memory: while it trains, at its end, and when there is too little."""

from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel

from halfbyte.data.loader import Batch, BatchPlan, make_batch
from halfbyte.device import peak_bytes, peak_rss_bytes
from halfbyte.errors import DeviceError
from halfbyte.memory.shortage import Shortage
from halfbyte.memory.usage import Usage
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.names import OPTIMIZERS
from halfbyte.plan.explain import by_owner, does_not_fit, gib
from halfbyte.plan.owners import OPTIMIZER, persistent_bytes
from halfbyte.plan.predict import Planner, Setting
from halfbyte.train.config import TrainConfig
from halfbyte.train.events import Notice
from halfbyte.train.gradients import NonFiniteError
from halfbyte.train.micro import cut
from halfbyte.train.survive import Survivor

REST = "activations and workspaces"


def memory_fields(model: PeftModel, optimizer: AdamW) -> dict[str, int]:
    """Return the fields of `StepFinished` that say how much memory is in use."""
    usage = Usage.measure(model.device)
    return {
        "memory_bytes": usage.peak_bytes,
        "allocated_bytes": usage.allocated_bytes,
        "reserved_bytes": usage.reserved_bytes,
        "paged_bytes": optimizer.host_bytes,
        "host_bytes": usage.host_bytes,
    }


def result_fields(model: PeftModel, optimizer: AdamW) -> dict[str, Any]:
    """Return the fields of `TrainResult` that say how much memory was in use."""
    is_gpu = model.device.type == "cuda"
    return {
        "peak_bytes": peak_bytes(model.device),
        "peak_by_owner": peak_by_owner(model, optimizer),
        "reserved_bytes": torch.cuda.max_memory_reserved(model.device) if is_gpu else 0,
        "paged_bytes": optimizer.host_bytes,
        "host_bytes": peak_rss_bytes(),
    }


def peak_by_owner(model: PeftModel, optimizer: AdamW) -> dict[str, int]:
    """Return the peak on a GPU by owner: what stays is counted, the rest is what comes and goes.

    Empty on a CPU, where the peak is that of the whole process.
    """
    if model.device.type != "cuda":
        return {}
    owners = {**persistent_bytes(model), OPTIMIZER: optimizer.resident_bytes}
    rest = Usage.measure(model.device).peak_bytes - sum(owners.values())
    return {**owners, REST: max(rest, 0)}


def rehearse(steps: Survivor, batches: BatchPlan, config: TrainConfig) -> Notice:
    """Do the worst step of a run without its update; say what was predicted and measured.

    Raises:
        DeviceError: it does not fit, whatever is given up.
    """
    worst = longest_step(batches)
    model = steps.model.model
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        steps.rehearse(worst, seed=config.seed)
    except NonFiniteError:  # its gradients are forgotten anyway; the real step will say it
        steps.optimizer.zero_grad()
    measured = Usage.measure(device).peak_bytes
    pieces = cut(steps.model, worst, steps.max_tokens)
    largest = max(pieces, key=lambda piece: piece.num_tokens)
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    setting = _setting(config, rows=1, length=largest.num_tokens, total_bytes=total)
    predicted = Planner(cast(PeftModel, model), device_type=device.type).predict(setting)
    return Notice(
        f"memory of the largest step ({largest.num_tokens:,} tokens at once): predicted "
        f"{gib(predicted.peak.nbytes)} ({by_owner(predicted.peak.owners)}), measured "
        f"{gib(measured)}"
    )


def longest_step(batches: BatchPlan) -> list[Batch]:
    """Return the micro-batches of the longest rows, as if one step had drawn them."""
    if batches.packing:
        return batches.step(0, 0)
    size = batches.batch_size
    longest = np.argsort(batches.lengths, kind="stable")[::-1][: batches.rows_per_step]
    return [
        make_batch(
            batches.dataset,
            [np.array([row]) for row in longest[start : start + size]],
            pad_token_id=batches.pad_token_id,
            packing=False,
        )
        for start in range(0, len(longest), size)
    ]


def explain(
    shortage: Shortage, model: PeftModel, config: TrainConfig, batches: BatchPlan
) -> DeviceError:
    """Return the error of a step that does not fit, whatever is given up.

    What was tried last is the longest row alone: batches were cut between rows, or documents.
    """
    longest = int(batches.lengths.max())
    setting = _setting(config, rows=1, length=longest, total_bytes=shortage.total_bytes)
    return does_not_fit(shortage, model, setting)


def _setting(config: TrainConfig, *, rows: int, length: int, total_bytes: int | None) -> Setting:
    state_bits, is_paged = OPTIMIZERS[config.optim]
    return Setting(
        rows=rows,
        length=length,
        memory=config.activations,
        compute=config.compute,
        state_bits=state_bits,
        is_paged=is_paged,
        is_checkpointed=config.gradient_checkpointing,
        total_bytes=total_bytes,
    )
