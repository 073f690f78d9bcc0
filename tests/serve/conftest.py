"""The embedded base in 4 bits with three adapters, in service; and what each says alone.

Everything is float32: there, the sums of a batch and of a single row differ so little that greedy
answers are the same to the last token.
"""

import contextlib
import queue
import threading
import time
from types import SimpleNamespace

import openai
import peft
import pytest
import torch

from halfbyte.adapters.inject import add_lora
from halfbyte.adapters.io import load_adapter, save_adapter
from halfbyte.demo.base import base_path
from halfbyte.generate.generate import generate
from halfbyte.models.load import load
from halfbyte.serve.app import create_app
from halfbyte.serve.engine import EngineConfig
from halfbyte.serve.server import Address, Server
from halfbyte.serve.service import open_service

LIMITS = {"max_batch_size", "max_queue"}
RANKS = {"red": 4, "green": 8, "blue": 2}


def open_demo(dtype=torch.float32):
    return load(base_path(), dtype=dtype, device="cpu")


def write_adapter(folder, rank, seed, **settings):
    """Write an adapter with random weights, loud enough to change every answer."""
    model, _ = open_demo()
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", **settings
    )
    adapted = add_lora(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return save_adapter(adapted, folder)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Folders of three adapters of different ranks, by name; all below one folder."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(root / name, rank, seed)
        for seed, (name, rank) in enumerate(RANKS.items())
    }


@pytest.fixture(scope="session")
def alone(adapters):
    """Return a function that answers one prompt by itself, through transformers and peft."""
    model, tokenizer = open_demo()
    for name, folder in adapters.items():
        model = load_adapter(model, folder, adapter=name)
    known = {}

    def answer(name, prompt, max_new_tokens=24):
        key = (name, str(prompt), max_new_tokens)
        if key not in known:
            settings = {"max_new_tokens": max_new_tokens}
            if name == "base":
                with model.disable_adapter():
                    known[key] = generate(model, tokenizer, prompt, **settings)
            else:
                model.set_adapter(name)
                known[key] = generate(model, tokenizer, prompt, **settings)
        return known[key]

    return answer


@contextlib.contextmanager
def in_service(adapters, *, max_model_len=256, dtype=torch.float32, **limits):
    """Put the embedded base and the three adapters into service, for the time of the block."""
    model, tokenizer = open_demo(dtype)
    service = open_service(
        model,
        tokenizer,
        name="base",
        adapters=adapters,
        config=EngineConfig(**limits),
        max_model_len=max_model_len,
    )
    try:
        yield service
    finally:
        service.close(timeout=0)


@contextlib.contextmanager
def over_http(service, adapters, *, api_key=None, request_timeout=60.0, shutdown_timeout=5.0):
    """Serve in a thread, on a free port of loopback, for the time of the block."""
    app = create_app(
        service,
        api_key=api_key,
        adapter_dir=next(iter(adapters.values())).parent,
        request_timeout=request_timeout,
        max_body_bytes=100_000,
    )
    urls = queue.Queue()
    address = Address(port=0, shutdown_timeout=shutdown_timeout)
    server = Server(app, service, address, on_ready=urls.put)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    url = urls.get(timeout=60)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0)
    try:
        yield SimpleNamespace(url=url, client=client, service=service, server=server, thread=thread)
    finally:
        client.close()
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def make_service(adapters):
    """Return a function that puts base and adapters into service until the test ends."""
    with contextlib.ExitStack() as opened:
        yield lambda **limits: opened.enter_context(in_service(adapters, **limits))


@pytest.fixture
def make_server(adapters):
    """Return a function that serves over HTTP until the test ends."""
    with contextlib.ExitStack() as opened:

        def make(*, service=None, **settings):
            limits = {name: settings.pop(name) for name in LIMITS & set(settings)}
            service = service or opened.enter_context(in_service(adapters, **limits))
            return opened.enter_context(over_http(service, adapters, **settings))

        yield make


@pytest.fixture(scope="session")
def service(adapters):
    """One service for all tests that leave it as it was."""
    with in_service(adapters, max_batch_size=8) as opened:
        yield opened


@pytest.fixture(scope="session")
def served(service, adapters):
    """The same over HTTP."""
    with over_http(service, adapters) as running:
        yield running


@pytest.fixture(scope="session")
def wait_until():
    """Return a function that waits for something that another thread does."""

    def wait(condition, seconds=60.0):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)

    return wait
