"""The answers of one HTTP request: queued together, gathered together, dropped together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from halfbyte.errors import HalfbyteError
from halfbyte.serve.answer import Answer, Event, Failure

T = TypeVar("T")
_REASONS: dict[Failure, str] = {
    "timeout": "the answer was not complete within the server's time limit",
    "stopping": "the server stopped before the answer was complete",
    "error": "the model failed; the server's log says why",
}


class GenerationError(HalfbyteError):
    """An answer could not be given.

    Args:
        failure: Why.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(_REASONS[failure])
        self.failure = failure


class ClientGoneError(Exception):
    """Nobody waits for the response any more."""


class Exchange:
    """Carries news of answers from the engine's thread into the event loop.

    Make it in the loop. `emit` may be called from any thread; everything else belongs to the loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.answers: list[Answer] = []

    def emit(self, index: int, event: Event) -> None:
        """Hand on news of a choice."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there any more
            self._loop.call_soon_threadsafe(self._news.put_nowait, (index, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield news until every answer has ended.

        Raises:
            GenerationError: an answer failed.
        """
        num_open = len(self.answers)
        while num_open:
            index, event = await self._news.get()
            if event.failure is not None:
                raise GenerationError(event.failure)
            num_open -= event.is_last
            yield index, event

    def cancel(self) -> None:
        """Free what the answers hold; for those that have ended this does nothing."""
        for answer in self.answers:
            answer.is_cancelled = True


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, or drop it when the client closes the connection.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await future


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
