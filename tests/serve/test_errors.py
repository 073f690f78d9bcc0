"""Every error of ours has its status; what nobody expected is a 500 that tells nothing inside."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from halfbyte.errors import ConfigError
from halfbyte.serve.catalog import UnknownModelError
from halfbyte.serve.engine import QueueFullError, StoppingError
from halfbyte.serve.errors import add_error_handlers, describe_error
from halfbyte.serve.exchange import GenerationError
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.prompt import ContextLengthError


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UnknownModelError("no"), 404, "model_not_found"),
        (QueueFullError("no"), 429, "queue_full"),
        (StoppingError("no"), 503, "stopping"),
        (GenerationError("timeout"), 503, "timeout"),
        (GenerationError("error"), 500, "error"),
        (ContextLengthError("no"), 400, "context_length_exceeded"),
        (ConfigError("no", hint="do this"), 400, None),
    ],
)
def test_errors_of_ours(error, status, code):
    got, body = describe_error(error)
    assert got == status
    assert body["error"]["code"] == code
    assert (error.hint or "") in body["error"]["message"]


def test_what_nobody_expected():
    app, metrics = FastAPI(), Metrics()
    add_error_handlers(app, metrics)

    @app.get("/fail")
    async def fail():
        raise RuntimeError("the secret")

    async def call():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/fail")

    response = asyncio.run(call())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert b'refused_total{status="500"} 1.0' in metrics.text()
