"""The end of a server: what runs is completed, what is new is refused, the rest is told so."""

import signal
import time

import openai
import pytest

from halfbyte.errors import ConfigError
from halfbyte.serve.server import Address, Server

CHAT = [{"role": "user", "content": "Go on."}]


def start_answer(served, **settings):
    """Begin a long answer, and return when its first text is there."""
    model = served.service.catalog.hold("red")
    model.stop_token_ids = frozenset()
    model.let_go()
    stream = served.client.chat.completions.create(
        model="red", messages=CHAT, stream=True, **settings
    )
    next(stream)
    return stream


def test_a_signal_lets_answers_end_and_refuses_new_ones(make_server, wait_until):
    served = make_server(max_batch_size=2, shutdown_timeout=60.0)
    stream = start_answer(served, max_tokens=120)
    served.server.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: served.service.engine.is_refusing)
    # As long as connections are taken the answer is 503; after that there are none.
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        served.client.chat.completions.create(model="base", messages=CHAT)
    assert list(stream)[-1].choices[0].finish_reason == "length"
    served.thread.join(20)
    assert not served.thread.is_alive()


def test_at_the_limit_answers_are_told_so(make_server):
    served = make_server(max_batch_size=2, shutdown_timeout=0.1)
    stream = start_answer(served, max_tokens=200)
    began = time.monotonic()
    served.server.handle_exit(signal.SIGTERM, None)
    with pytest.raises(openai.APIError, match="stopped before"):
        list(stream)
    served.thread.join(20)
    assert time.monotonic() - began < 20


def test_a_port_that_is_taken_is_an_error(served, service):
    port = int(served.url.rpartition(":")[2])
    server = Server(served.server.config.app, service, Address(port=port))
    service_close, service.close = service.close, lambda timeout: None
    try:
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on"):
            server.run_until_signal()
    finally:
        service.close = service_close


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.2", False),
    ],
)
def test_loopback(host, is_loopback):
    assert Address(host=host).is_loopback is is_loopback


@pytest.mark.parametrize("bad", [{"port": 70000}, {"shutdown_timeout": -1}], ids=str)
def test_addresses_are_checked(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Address(**bad)
