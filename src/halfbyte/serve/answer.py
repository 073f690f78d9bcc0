"""One answer on its way: what it was asked, how far it is, and whom to tell.

A request for n choices is n answers. Times are seconds of `time.monotonic`.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from transformers import DynamicCache

from halfbyte.generate.sampling import Sampling
from halfbyte.serve.adapter import ServedModel
from halfbyte.serve.text import Piece, TextStream

FinishReason = Literal["stop", "length"]
Failure = Literal["timeout", "stopping", "error"]


@dataclass(frozen=True)
class Event:
    """News of an answer; the last one has a reason or a failure.

    Args:
        piece: Text that came, and its tokens.
        num_tokens: Tokens generated so far.
        finish_reason: Why the answer ended.
        failure: What went wrong instead.
    """

    piece: Piece = field(default_factory=Piece)
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    failure: Failure | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish_reason is not None or self.failure is not None


@dataclass(eq=False)
class Answer:
    """One answer, from the queue to its last token.

    Args:
        model: Who answers; held from the moment the request was taken, so that an adapter that is
            swapped meanwhile still ends its own answers.
        prompt_ids: The prompt's tokens.
        sampling: How tokens are chosen, and how many at most.
        emit: Told of every token; called from the engine's thread, so it must be quick.
        stop: Strings that end the answer.
        num_top_logprobs: Likeliest tokens to report beside each; None reports no logprobs.
        deadline: When the answer must be complete.
    """

    model: ServedModel
    prompt_ids: list[int]
    sampling: Sampling
    emit: Callable[[Event], None]
    stop: tuple[str, ...] = ()
    num_top_logprobs: int | None = None
    deadline: float = float("inf")
    is_cancelled: bool = False
    """Set from any thread when nobody waits for the answer any more."""
    arrived: float = field(default_factory=time.monotonic)
    last_token: int = field(default=0, init=False)
    num_tokens: int = field(default=0, init=False)
    num_read: int = field(default=0, init=False)
    """Tokens of the prompt whose keys and values are there."""
    cache: DynamicCache | None = field(default=None, init=False)
    """Of a long prompt that is read piece by piece."""

    def __post_init__(self) -> None:
        self.text = TextStream(self.model.tokenizer, self.stop)
        self._random = random.Random(self.sampling.seed)

    def draw(self) -> float:
        """Return the next number, in [0, 1), of the answer's own generator."""
        return self._random.random()

    @property
    def position(self) -> int:
        """Index of the newest token in the row."""
        return len(self.prompt_ids) + self.num_tokens - 1
