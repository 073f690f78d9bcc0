"""Without the key nothing under /v1 is read; bodies end at the limit, announced or not."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from halfbyte.serve.guard import Guard


async def length(request):
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
def send():
    app = Starlette(
        routes=[
            Route(path, length, methods=["GET", "POST"]) for path in ("/v1/x", "/v1x", "/health")
        ]
    )
    guarded = Guard(app, api_key="Ägypten", max_body_bytes=10)

    async def call(method, path, **settings):
        transport = httpx.ASGITransport(app=guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, **settings)

    def run(*args, key="Ägypten", **settings):
        import asyncio

        headers = {} if key is None else {"authorization": f"Bearer {key}".encode()}
        return asyncio.run(call(*args, headers=headers, **settings))

    return run


async def pieces(count):
    for _ in range(count):
        yield b"1234"


def test_the_key_opens_v1_and_only_that_needs_it(send):
    assert send("POST", "/v1/x", content=b"123").text == "3"
    assert send("GET", "/health", key=None).status_code == 200
    for key in (None, "", "Ägypte", "Ägypten "):
        response = send("POST", "/v1/x", key=key, content=b"123")
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_bodies_end_at_the_limit(send):
    assert send("POST", "/v1/x", content=b"x" * 10).text == "10"
    response = send("POST", "/v1/x", content=b"x" * 11)
    assert response.status_code == 413
    assert "larger than 10 bytes" in response.json()["error"]["message"]
    assert send("POST", "/v1/x", content=pieces(2)).text == "8"
    assert send("POST", "/v1/x", content=pieces(3)).status_code == 413
