"""What fits on a card: the most tokens of a micro-step, and the changes that make one fit."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.plan.cards import GIB, SIZES, usable_bytes
from halfbyte.plan.owners import ADAPTERS, GRADIENTS, OPTIMIZER
from halfbyte.plan.predict import Planner, Prediction, Setting

_PROBES = (1024, 8192)
_STEPS = 6
_UNIT = 32  # tokens


def max_tokens(planner: Planner, setting: Setting, total_bytes: int) -> int:
    """Return the most tokens of one micro-step on a card, 0 where none fit.

    As one sequence or as many rows: the bytes of a step hang on the tokens. Everything that can be
    computed twice is. Peaks are nearly linear in tokens, so a few are enough to find the last one.
    """
    memory = "fast" if setting.memory == "fast" else "lean"
    smallest = replace(setting, rows=1, memory=memory, total_bytes=total_bytes)
    usable = usable_bytes(total_bytes)

    def peak(tokens: int) -> int:
        return planner.predict(replace(smallest, length=tokens)).peak.nbytes

    low, first = _PROBES[0], peak(_PROBES[0])
    if first > usable:
        return 0
    high = _PROBES[1]
    slope = (peak(high) - first) / (high - low)
    if planner.why_unfused is not None:  # a trace takes a second: the line is enough
        return _whole(low + (usable - first) / slope)
    guess = _whole(low + (usable - first) / slope)
    for _ in range(_STEPS):
        nbytes = peak(guess)
        if nbytes <= usable and usable - nbytes < slope * 2 * _UNIT:
            break
        if guess > low:
            slope = (nbytes - first) / (guess - low)
        guess = _whole(low + (usable - first) / slope)
    while guess > 0 and peak(guess) > usable:
        guess -= _UNIT
    return guess


def table(planner: Planner, setting: Setting) -> dict[int, int]:
    """Return the most tokens of a micro-step for each of the common card sizes, in GB."""
    return {size: max_tokens(planner, setting, size * GIB) for size in SIZES}


@dataclass(frozen=True)
class Change:
    """One thing to set otherwise, and the peak with it."""

    text: str
    peak_bytes: int


def changes(planner: Planner, prediction: Prediction, *, count: int = 3) -> list[Change]:
    """Return the smallest changes with which a step fits, the least felt first."""
    if prediction.setting.total_bytes is None:
        return []
    fitting = (change for change in _candidates(planner, prediction) if change is not None)
    return list(itertools.islice(fitting, count))


def _candidates(planner: Planner, prediction: Prediction) -> Iterator[Change | None]:
    """Yield changes that fit, and None for those that do not."""
    setting = prediction.setting
    assert setting.total_bytes is not None
    tokens = max_tokens(planner, replace(setting, memory="lean"), setting.total_bytes)

    def changed(text: str, **settings: Any) -> Change | None:
        found = planner.predict(replace(setting, **settings))
        return Change(text, found.peak.nbytes) if found.fits else None

    if not setting.is_paged:
        name = "paged_adamw_32bit" if setting.state_bits == 32 else "paged_adamw_8bit"
        yield changed(f"optim: {name}", is_paged=True)
    if setting.memory != "lean" and planner.why_unfused is None:
        yield changed("memory: lean", memory="lean")
    if planner.why_unfused is not None and not setting.is_checkpointed:
        yield changed("gradient_checkpointing: true", is_checkpointed=True)
    if 0 < tokens < setting.tokens and setting.rows > 1 and tokens >= setting.length:
        rows = tokens // setting.length
        yield changed(f"per_device_train_batch_size: {rows}", rows=rows, memory="lean")
    if setting.state_bits == 32 and not prediction.paged_bytes:
        yield changed("optim: paged_adamw_8bit", state_bits=8, is_paged=True)
    if 0 < tokens < setting.length:
        yield changed(f"max_length: {tokens}", rows=1, length=tokens, memory="lean")
    yield from _smaller_ranks(prediction)
    for size in SIZES:
        larger = changed(f"a card of {size} GB", total_bytes=size * GIB)
        if size * GIB > setting.total_bytes and larger is not None:
            yield larger
            return


def _smaller_ranks(prediction: Prediction) -> Iterator[Change]:
    """Halve the rank until that is enough: adapters, gradients and moments shrink with it."""
    owners = prediction.persistent
    bound = sum(owners.get(name, 0) for name in (ADAPTERS, GRADIENTS, OPTIMIZER))
    total = prediction.setting.total_bytes or 0
    for power, share in enumerate(("half", "quarter", "eighth"), start=1):
        nbytes = prediction.peak.nbytes - bound + (bound >> power)
        if nbytes <= usable_bytes(total):
            yield Change(f"r: {share} of what it is", nbytes)
            return


def _whole(tokens: float) -> int:
    return max(int(tokens) // _UNIT * _UNIT, _UNIT)
