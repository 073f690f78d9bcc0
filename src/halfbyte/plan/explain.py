"""Why a step does not fit, in words: the bytes by owner, and what to set otherwise."""

from collections.abc import Mapping
from dataclasses import replace

from peft import PeftModel

from halfbyte.errors import DeviceError, HalfbyteError
from halfbyte.memory.shortage import Shortage
from halfbyte.plan.cards import CONTEXT_BYTES
from halfbyte.plan.changes import changes
from halfbyte.plan.predict import Planner, Prediction, Setting

# Of the memory, where a step that fits by the plan did not.
_ERRING = 0.95
_GENERAL = "lower per_device_train_batch_size, max_length or r, or take a larger card"


def does_not_fit(shortage: Shortage, model: PeftModel, setting: Setting) -> DeviceError:
    """Return the error of a step that ran out of memory whatever was given up.

    Args:
        shortage: How memory stood.
        model: The adapted model.
        setting: Of the smallest step that was tried, as it was asked for.
    """
    if shortage.device.type != "cuda":
        return DeviceError(
            f"a step does not fit into memory, cut as small as it can be: {shortage.reason}",
            hint=_GENERAL,
        )
    try:
        planner = Planner(model)
        prediction = _tried(planner, setting, shortage)
        found = changes(planner, prediction, card_bytes=shortage.total_bytes)
    except HalfbyteError:
        return DeviceError(f"a step does not fit: {shortage.reason}", hint=_GENERAL)
    hint = "; or ".join(f"{c.text} (peak {gib(c.peak_bytes)})" for c in found) or _GENERAL
    return DeviceError(
        f"a step of {setting.rows} x {setting.length:,} tokens does not fit, cut as small as it "
        f"can be: it needs {gib(prediction.peak.nbytes)} at {prediction.peak.moment} "
        f"({by_owner(prediction.peak.owners)}); of {gib(shortage.total_bytes)} on "
        f"{shortage.device}, {gib(shortage.free_bytes)} are free, {gib(shortage.allocated_bytes)} "
        f"were in tensors and {gib(shortage.cached_bytes)} in pieces too small",
        hint=hint,
    )


def _tried(planner: Planner, setting: Setting, shortage: Shortage) -> Prediction:
    """Predict the last attempt, with all given up that could be, in the memory that there was.

    Where the plan says that it fits, it errs by more than it leaves free: that much less is there.
    """
    there = shortage.free_bytes + shortage.allocated_bytes + shortage.cached_bytes + CONTEXT_BYTES
    total = min(there, shortage.total_bytes)
    last = replace(setting, memory="lean", is_checkpointed=True, total_bytes=total)
    prediction = planner.predict(last)
    while prediction.fits and total > CONTEXT_BYTES:
        total = int(_ERRING * total)
        prediction = planner.predict(replace(last, total_bytes=total))
    return prediction


def by_owner(owners: Mapping[str, int]) -> str:
    """Return bytes by owner on one line, the largest first."""
    ordered = sorted(owners.items(), key=lambda item: -item[1])
    return ", ".join(f"{owner} {gib(nbytes)}" for owner, nbytes in ordered if nbytes)


def gib(nbytes: float) -> str:
    """Return bytes as people read them."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.0f} MiB"
