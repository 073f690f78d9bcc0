"""Why a step does not fit, in words: the bytes by owner, and what to set otherwise."""

from collections.abc import Mapping

from peft import PeftModel

from halfbyte.errors import DeviceError, HalfbyteError
from halfbyte.memory.shortage import Shortage
from halfbyte.plan.changes import changes
from halfbyte.plan.predict import Planner, Setting

_GENERAL = "lower per_device_train_batch_size, max_length or r, or take a larger card"


def does_not_fit(shortage: Shortage, model: PeftModel, setting: Setting) -> DeviceError:
    """Return the error of a step that ran out of memory whatever was given up.

    Args:
        shortage: How memory stood.
        model: The adapted model.
        setting: Of the step, as it was asked for.
    """
    if shortage.device.type != "cuda":
        return DeviceError(
            f"a step does not fit into memory, cut as small as it can be: {shortage.reason}",
            hint=_GENERAL,
        )
    try:
        planner = Planner(model)
        prediction = planner.predict(setting)
        found = changes(planner, prediction)
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


def by_owner(owners: Mapping[str, int]) -> str:
    """Return bytes by owner on one line, the largest first."""
    ordered = sorted(owners.items(), key=lambda item: -item[1])
    return ", ".join(f"{owner} {gib(nbytes)}" for owner, nbytes in ordered if nbytes)


def gib(nbytes: float) -> str:
    """Return bytes as people read them."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.0f} MiB"
