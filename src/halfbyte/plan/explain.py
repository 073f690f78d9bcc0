"""Why a step does not fit, in words: the bytes by owner, and what to set otherwise."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

from peft import PeftModel

from halfbyte.device import ALLOCATOR_VARIABLES, JOINING, can_join_memory
from halfbyte.errors import DeviceError, HalfbyteError
from halfbyte.memory.shortage import Shortage
from halfbyte.plan.cards import CONTEXT_BYTES
from halfbyte.plan.changes import Change, changes
from halfbyte.plan.predict import Planner, Prediction, Setting

# Of the memory, where a step that fits by the plan did not.
_ERRING = 0.95
_NUM_CHANGES = 3
_MUCH = 2**30
_MUCH_IN_PIECES = 2**28
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
        expected = _expected(planner, setting, shortage)
        prediction = _tried(planner, expected)
        found = [
            *_without_pieces(expected, shortage),
            *_without_others(planner, prediction, shortage),
            *changes(planner, prediction, card_bytes=shortage.total_bytes),
        ][:_NUM_CHANGES]
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


def _expected(planner: Planner, setting: Setting, shortage: Shortage) -> Prediction:
    """Predict the last attempt, with all given up that could be, in the memory that there was."""
    total = shortage.total_bytes - _others_bytes(shortage)
    last = replace(setting, memory="lean", is_checkpointed=True, total_bytes=total)
    return planner.predict(last)


def _tried(planner: Planner, expected: Prediction) -> Prediction:
    """Predict the last attempt in so much less memory that it does not fit, since it did not."""
    prediction, total = expected, expected.setting.total_bytes or 0
    while prediction.fits and total > CONTEXT_BYTES:
        total = int(_ERRING * total)
        prediction = planner.predict(replace(expected.setting, total_bytes=total))
    return prediction


def _without_pieces(expected: Prediction, shortage: Shortage) -> Iterator[Change]:
    """Yield that free memory be joined, where only its pieces were too small.

    Training has it joined, unless the user said otherwise or CUDA had started before.
    """
    told = [name for name in ALLOCATOR_VARIABLES if name in os.environ] or ALLOCATOR_VARIABLES
    can_help = can_join_memory() and not any(JOINING in os.environ.get(name, "") for name in told)
    if expected.fits and shortage.cached_bytes > _MUCH_IN_PIECES and can_help:
        text = f"set {told[0]}={JOINING} before Python starts, which joins free pieces"
        yield Change(text, expected.peak.nbytes)


def _without_others(planner: Planner, tried: Prediction, shortage: Shortage) -> Iterator[Change]:
    """Yield that the step would fit if it had the card for itself, where that is so."""
    others = _others_bytes(shortage)
    alone = planner.predict(replace(tried.setting, total_bytes=shortage.total_bytes))
    if others > _MUCH and alone.fits:
        yield Change(f"end what else uses the GPU ({gib(others)})", alone.peak.nbytes)


def _others_bytes(shortage: Shortage) -> int:
    """Return what other processes took of the device."""
    there = shortage.free_bytes + shortage.allocated_bytes + shortage.cached_bytes + CONTEXT_BYTES
    return max(shortage.total_bytes - there, 0)


def by_owner(owners: Mapping[str, int]) -> str:
    """Return bytes by owner on one line, the largest first."""
    ordered = sorted(owners.items(), key=lambda item: -item[1])
    return ", ".join(f"{owner} {gib(nbytes)}" for owner, nbytes in ordered if nbytes)


def gib(nbytes: float) -> str:
    """Return bytes as people read them."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.0f} MiB"
