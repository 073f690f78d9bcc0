"""What fits on a card: the most tokens of a micro-step."""

from dataclasses import replace

from halfbyte.plan.cards import GIB, SIZES, usable_bytes
from halfbyte.plan.predict import Planner, Setting

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


def _whole(tokens: float) -> int:
    return max(int(tokens) // _UNIT * _UNIT, _UNIT)
