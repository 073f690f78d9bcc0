"""When what had to leave the device may come back, so that it does not go to and fro."""

import sys

_STEPS = 8


class Patience:
    """Counts what was free in each of the last steps; every departure doubles how many these are.

    Memory that one step leaves free the next one may need: a batch of long rows, a checkpoint.
    """

    def __init__(self) -> None:
        self._steps = _STEPS // 2
        self._count, self._least = 0, sys.maxsize

    def left(self) -> None:
        """Take note that something had to leave: what was free before says nothing any more."""
        self._steps *= 2
        self._count, self._least = 0, sys.maxsize

    def after_step(self, free_bytes: int) -> int:
        """Return the bytes that may come back now: those that were free in all steps of the wait.

        Args:
            free_bytes: Free in this step.
        """
        self._least = min(self._least, free_bytes)
        self._count += 1
        if self._count < self._steps:
            return 0
        least = max(self._least, 0)
        self._count, self._least = 0, sys.maxsize
        return least
