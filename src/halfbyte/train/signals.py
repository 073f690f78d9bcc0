"""Signals that ask a run to stop: the step is finished, a checkpoint saved, and then it ends.

    signal              from                            exit code
    SIGHUP   (1)        a terminal that is gone         129  (under nohup it is ignored, as always)
    SIGINT   (2)        Ctrl-C                          130
    SIGTERM  (15)       kill, Slurm, Kubernetes         143
    SIGUSR1  (10)       Slurm's warning before the end  138

The handler only remembers the signal. It also gives the signals their default action back, so that
a second one ends the process at once; checkpoints appear whole or not at all, so nothing breaks.
"""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from halfbyte.errors import HalfbyteError

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(HalfbyteError):  # noqa: N818 - it is no error that somebody made
    """A signal ended the run after a whole step.

    Attributes:
        exit_code: 128 plus the signal's number, as a shell reports it.
        step: Steps done.
    """

    def __init__(self, signum: int, step: int, output_dir: Path) -> None:
        self.exit_code = 128 + signum
        self.step = step
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; "
            f"a checkpoint is in {output_dir}",
            hint="resume_from_checkpoint=auto goes on from here",
        )


class Interruption:
    """While entered, remembers the first signal that asks the run to stop.

    Outside the main thread, where Python cannot handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signum is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            wanted = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL)
