"""What a run knows of its memory: while it trains, at its end, and when there is too little."""

from peft import PeftModel

from halfbyte.data.loader import BatchPlan
from halfbyte.errors import DeviceError
from halfbyte.memory.shortage import Shortage
from halfbyte.memory.usage import Usage
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.names import OPTIMIZERS
from halfbyte.plan.explain import does_not_fit
from halfbyte.plan.owners import OPTIMIZER, persistent_bytes
from halfbyte.plan.predict import Setting
from halfbyte.train.config import TrainConfig

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


def peak_by_owner(model: PeftModel, optimizer: AdamW) -> dict[str, int]:
    """Return the peak on a GPU by owner: what stays is counted, the rest is what comes and goes.

    Empty on a CPU, where the peak is that of the whole process.
    """
    if model.device.type != "cuda":
        return {}
    owners = {**persistent_bytes(model), OPTIMIZER: optimizer.resident_bytes}
    rest = Usage.measure(model.device).peak_bytes - sum(owners.values())
    return {**owners, REST: max(rest, 0)}


def explain(
    shortage: Shortage, model: PeftModel, config: TrainConfig, batches: BatchPlan
) -> DeviceError:
    """Return the error of a step that does not fit, whatever is given up."""
    longest = batches.max_length if batches.packing else int(batches.lengths.max())
    state_bits, is_paged = OPTIMIZERS[config.optim]
    setting = Setting(
        rows=config.per_device_train_batch_size,
        length=longest,
        memory=config.memory,
        state_bits=state_bits,
        is_paged=is_paged,
        is_checkpointed=config.gradient_checkpointing,
        total_bytes=shortage.total_bytes,
    )
    return does_not_fit(shortage, model, setting)
