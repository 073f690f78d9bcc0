"""News come in order from another thread; a failure, or a client that leaves, ends the wait."""

import asyncio
import threading

import pytest

from halfbyte.serve.answer import Event
from halfbyte.serve.exchange import ClientGoneError, Exchange, GenerationError, unless_gone
from halfbyte.serve.text import Piece


class Waiting:
    """Stands for an answer or a request."""

    def __init__(self, *messages):
        self.is_cancelled = False
        self.messages = list(messages)

    async def receive(self):
        if not self.messages:
            await asyncio.sleep(60)
        return {"type": self.messages.pop(0)}


def test_news_of_all_answers_until_the_last():
    async def gather():
        exchange = Exchange()
        exchange.answers = [Waiting(), Waiting()]
        events = [(0, Event(Piece("a"))), (1, Event(finish_reason="stop"))]
        events += [(0, Event(finish_reason="length"))]
        thread = threading.Thread(target=lambda: [exchange.emit(*event) for event in events])
        thread.start()
        return [event async for event in exchange.events()], events

    got, sent = asyncio.run(gather())
    assert got == sent


def test_a_failure_is_raised_and_cancelling_reaches_all():
    async def gather():
        exchange = Exchange()
        exchange.answers = [Waiting(), Waiting()]
        exchange.emit(1, Event(failure="timeout"))
        with pytest.raises(GenerationError, match="time limit"):
            [event async for event in exchange.events()]
        exchange.cancel()
        return exchange

    exchange = asyncio.run(gather())
    assert all(answer.is_cancelled for answer in exchange.answers)
    exchange.emit(0, Event())  # the loop is closed: nothing happens


def test_work_is_dropped_when_the_client_goes():
    was_cancelled = []

    async def work():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            was_cancelled.append(True)
            raise

    async def run():
        with pytest.raises(ClientGoneError):
            await unless_gone(Waiting("http.request", "http.disconnect"), work())
        return await unless_gone(Waiting(), asyncio.sleep(0, "done"))

    assert asyncio.run(run()) == "done"
    assert was_cancelled


def test_what_the_work_raises_is_raised():
    async def fail():
        raise GenerationError("error")

    with pytest.raises(GenerationError):
        asyncio.run(unless_gone_of(fail))


async def unless_gone_of(work):
    return await unless_gone(Waiting(), work())
