"""Continuous batching: answers join and leave between any two tokens.

One thread owns the model. Each turn of its loop

    1. runs what other threads asked for between steps (adapters that come and go)
    2. drops answers that were cancelled or are late
    3. reads waiting prompts into free rows, several short ones at once or a piece of a long one
    4. takes one more token in every running answer, whichever adapter it uses

(iteration-level scheduling: Orca, Yu et al., OSDI 2022). A long prompt is read in pieces, so that
running answers go on meanwhile.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from halfbyte.errors import ConfigError, HalfbyteError
from halfbyte.serve.answer import Answer, Event, Failure, FinishReason
from halfbyte.serve.choose import choose, describe
from halfbyte.serve.forward import BatchedModel
from halfbyte.serve.metrics import Metrics

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class QueueFullError(HalfbyteError):
    """More requests wait than the server was told to hold."""


class StoppingError(HalfbyteError):
    """The server is on its way out and takes no new request."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of the engine.

    Args:
        max_batch_size: Most answers that run at once.
        max_queue: Most answers that wait.
        prefill_tokens: Most prompt tokens that are read at once, padding counted.

    Raises:
        ConfigError: a limit is not positive.
    """

    max_batch_size: int = 16
    max_queue: int = 256
    prefill_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_queue", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} should be 1 or more, got {getattr(self, name)}")


class Engine:
    """The thread that generates, and the queue before it.

    Args:
        model: The model with its cache, of `config.max_batch_size` rows.
        config: Limits.
        metrics: Where to count.
    """

    def __init__(self, model: BatchedModel, config: EngineConfig, metrics: Metrics) -> None:
        self._model, self._config, self._metrics = model, config, metrics
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: list[Answer] = []  # in the order of the cache's rows
        self._reading: list[Answer] = []  # their prompts are, a long one piece by piece
        self._refuses = self._ends = False
        self._thread = threading.Thread(target=self._loop, name="halfbyte-engine", daemon=True)
        metrics.slots.set(config.max_batch_size)

    def start(self) -> None:
        """Begin to generate."""
        self._thread.start()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Queue the answers of one request, all or none.

        Raises:
            QueueFullError: there is no room for them.
            StoppingError: the engine is stopping.
        """
        with self._changed:
            if self._refuses:
                raise StoppingError("the server is stopping", hint="try another one")
            room = self._config.max_queue + self._num_free() - len(self._waiting)
            if len(answers) > room:
                raise QueueFullError(
                    f"{len(self._waiting)} answers wait already, of {self._config.max_queue} "
                    "that may",
                    hint="try again later",
                )
            for answer in answers:
                answer.model.hold()
            self._waiting.extend(answers)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def between_steps(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function on the engine's thread while the model does not run."""
        future: Future[T] = Future()
        with self._changed:
            if self._ends:
                raise StoppingError("the server is stopping")
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def refuse(self) -> None:
        """Take no new answer; those that wait or run go on."""
        with self._changed:
            self._refuses = True

    def stop(self, timeout: float = 30.0) -> None:
        """End what runs after at most `timeout` seconds, and the thread with it."""
        self.refuse()
        deadline = time.monotonic() + timeout
        with self._changed:
            self._changed.wait_for(self._is_idle, timeout)
            self._ends = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(max(deadline - time.monotonic(), 0) + 5.0)

    @property
    def is_alive(self) -> bool:
        """Whether answers are generated."""
        return self._thread.is_alive()

    @property
    def is_refusing(self) -> bool:
        """Whether new answers are refused."""
        return self._refuses

    def _num_free(self) -> int:
        return self._config.max_batch_size - len(self._running) - len(self._reading)

    def _is_idle(self) -> bool:
        return not (self._waiting or self._running or self._reading or self._calls)

    @torch.no_grad()
    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ends or not self._is_idle())
                calls = list(self._calls)
                self._calls.clear()
                if self._ends:
                    break
            for function, future in calls:
                _run(function, future)
            try:
                self._sweep()
                self._read()
                self._step()
            except Exception:  # noqa: BLE001  a failure of one step must not leave every client waiting
                _LOG.exception("a step failed; the answers that ran are given up")
                self._give_up("error")
            with self._changed:
                self._changed.notify_all()
        for _, future in calls:
            future.cancel()
        self._give_up("stopping")

    def _sweep(self) -> None:
        """Drop answers that nobody waits for, or that are late."""
        now = time.monotonic()

        def is_over(answer: Answer) -> bool:
            return answer.is_cancelled or answer.deadline < now

        with self._changed:
            gone = [answer for answer in [*self._waiting, *self._reading] if is_over(answer)]
            if gone:
                self._waiting = deque(a for a in self._waiting if a not in gone)
                self._reading = [a for a in self._reading if a not in gone]
        for row in reversed(range(len(self._running))):
            if is_over(self._running[row]):
                gone.append(self._free(row))
        for answer in gone:
            self._leave(answer, "timeout")

    def _read(self) -> None:
        """Read one batch of prompts, or one piece of a long one, and take their first tokens."""
        answers = self._reading or self._next_prompts()
        if not answers:
            return
        limit = self._config.prefill_tokens
        pieces = [a.prompt_ids[a.num_read : a.num_read + limit] for a in answers]
        cache = answers[0].cache or DynamicCache()
        for answer, piece in zip(answers, pieces, strict=True):
            answer.num_read += len(piece)
        is_partial = answers[0].num_read < len(answers[0].prompt_ids)
        slots = [answer.model.slot for answer in answers]
        logits = self._model.prefill(pieces, slots, cache, is_partial=is_partial)
        if is_partial:
            answers[0].cache = cache
            return
        first = len(self._running)
        for source, answer in enumerate(answers):
            answer.cache = None
            self._metrics.prompt_tokens.labels(answer.model.name).inc(len(answer.prompt_ids))
            self._metrics.first_token.observe(time.monotonic() - answer.arrived)
            self._model.cache.join(first + source, cache, source, len(answer.prompt_ids))
        self._running += answers
        self._reading = []
        self._take(first, logits)

    def _next_prompts(self) -> list[Answer]:
        """Take prompts from the queue, in order, that fit into free rows and one forward pass."""
        longest = 0
        with self._changed:
            while self._waiting and self._num_free():
                longest = max(longest, len(self._waiting[0].prompt_ids))
                padded = longest * (len(self._reading) + 1)
                if self._reading and padded > self._config.prefill_tokens:
                    break
                self._reading.append(self._waiting.popleft())
            self._metrics.waiting.set(len(self._waiting))
        return self._reading

    def _step(self) -> None:
        """Take one more token in every running answer."""
        if not self._running:
            return
        began = time.monotonic()
        rows = self._running
        logits = self._model.decode(
            [a.last_token for a in rows], [a.position for a in rows], [a.model.slot for a in rows]
        )
        self._take(0, logits)
        self._metrics.step.observe(time.monotonic() - began)

    def _take(self, first: int, logits: Tensor) -> None:
        """Choose the next token of the rows from `first` on, tell who waits, free ended rows."""
        answers = self._running[first:]
        draws = [a.draw() if a.sampling.temperature > 0 else 0.0 for a in answers]
        tokens = choose(logits, [a.sampling for a in answers], draws)
        for offset in reversed(range(len(answers))):
            reason = _advance(answers[offset], tokens[offset], logits[offset])
            if reason is not None:
                self._leave(self._free(first + offset), reason)
        self._metrics.running.set(len(self._running))

    def _free(self, row: int) -> Answer:
        """Take an answer out of its row, and return it; the last one moves there."""
        answer, last = self._running[row], self._running.pop()
        if last is not answer:
            self._model.cache.move(len(self._running), row, last.position)
            self._running[row] = last
        return answer

    def _leave(self, answer: Answer, outcome: FinishReason | Failure) -> None:
        """Say how an answer ended, and let its adapter go."""
        name, is_cancelled = answer.model.name, answer.is_cancelled
        self._metrics.requests.labels(name, "cancelled" if is_cancelled else outcome).inc()
        self._metrics.generation_tokens.labels(name).inc(answer.num_tokens)
        self._metrics.latency.observe(time.monotonic() - answer.arrived)
        if outcome == "stop" or outcome == "length":
            event = Event(answer.text.finish(), answer.num_tokens, finish_reason=outcome)
        else:
            event = Event(num_tokens=answer.num_tokens, failure=outcome)
        if not is_cancelled:
            answer.emit(event)
        answer.model.let_go()

    def _give_up(self, failure: Failure) -> None:
        """End all that is read or runs, and what waits too where the engine stops."""
        with self._changed:
            gone = [*self._running, *self._reading]
            if failure == "stopping":
                gone += self._waiting
                self._waiting.clear()
            self._running, self._reading = [], []
        for answer in gone:
            self._leave(answer, failure)
        self._metrics.running.set(0)


def _advance(answer: Answer, token: int, logits_V: Tensor) -> FinishReason | None:
    """Give an answer its next token, and return why it ends with it, if it does."""
    answer.last_token = token
    answer.num_tokens += 1
    if token in answer.model.stop_token_ids:
        return "stop"
    num_top = answer.num_top_logprobs
    choice = None if num_top is None else describe(logits_V, token, num_top)
    piece = answer.text.push(token, choice)
    if piece.text or piece.choices:
        answer.emit(Event(piece, answer.num_tokens))
    if answer.text.is_stopped:
        return "stop"
    return "length" if answer.num_tokens >= answer.sampling.max_new_tokens else None


def _run(function: Callable[[], Any], future: "Future[Any]") -> None:
    """Run a call from another thread; what it raises is raised there."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001  (handed on whole)
        future.set_exception(error)
