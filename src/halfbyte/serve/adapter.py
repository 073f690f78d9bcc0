"""What a request can name as `model`: the base, or an adapter on it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase


@dataclass(eq=False)
class ServedModel:
    """A name that answers, for as long as somebody holds it.

    Args:
        name: What requests call it.
        path: Where it was read.
        tokenizer: The adapter's own where training saved one, so that prompts are rendered with the
            template that was trained; else the base's.
        stop_token_ids: Tokens that end its answers.
        slot: Where its weights stand in the bank; 0 is the base alone.
        parent: Name of the base, None for the base itself.
        on_free: Called once, when it is retired and the last holder has let go.
    """

    name: str
    path: Path
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: frozenset[int]
    slot: int = 0
    parent: str | None = None
    on_free: Callable[[], None] = lambda: None
    _num_holders: int = field(default=0, init=False)
    _is_retired: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def hold(self) -> None:
        """Keep it from being freed."""
        with self._lock:
            self._num_holders += 1

    def let_go(self) -> None:
        """Undo one `hold`."""
        with self._lock:
            self._num_holders -= 1
            is_free = self._is_retired and not self._num_holders
        if is_free:
            self.on_free()

    def retire(self) -> None:
        """Free it when nobody holds it any more: its name is gone, or another's."""
        with self._lock:
            self._is_retired = True
            is_free = not self._num_holders
        if is_free:
            self.on_free()
