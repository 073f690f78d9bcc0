"""What stands before every request: the API key, and the size of the body.

Plain ASGI, so that streams pass through it untouched. Keys are compared in constant time, and never
logged or shown. The key guards /v1; health and metrics are for the machinery around the server.
"""

import hashlib
import hmac
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halfbyte.serve.responses import error_body

_GUARDED = "/v1"


class Guard:
    """ASGI middleware that refuses requests before they are read.

    Args:
        app: What comes after.
        api_key: What `Authorization: Bearer` must carry; None lets everybody in.
        max_body_bytes: Largest body.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._key_digest = None if api_key is None else _digest(f"Bearer {api_key}".encode())
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._is_allowed(scope["path"], headers.get(b"authorization", b"")):
            message = "Incorrect API key provided."
            body = error_body(message, kind="authentication_error", code="invalid_api_key")
            await _answer(send, 401, body, ((b"www-authenticate", b"Bearer"),))
            return
        announced = headers.get(b"content-length", b"0")
        too_large = not announced.isdigit() or int(announced) > self._max_body_bytes
        # A body without a length is read here, as far as it may go.
        if b"content-length" not in headers and scope["method"] == "POST":
            received, too_large = await self._read(receive)
            receive = _replay(received, receive)
        if too_large:
            limit = f"the request is larger than {self._max_body_bytes} bytes"
            await _answer(send, 413, error_body(limit, code="request_too_large"))
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, path: str, header: bytes) -> bool:
        if self._key_digest is None or not (path == _GUARDED or path.startswith(f"{_GUARDED}/")):
            return True
        # Digests, so that not even the key's length shows in the time.
        return hmac.compare_digest(_digest(header), self._key_digest)

    async def _read(self, receive: Receive) -> tuple[list[Message], bool]:
        """Return the messages of a body, and whether it is too large."""
        messages, num_bytes = [], 0
        while True:
            message = await receive()
            messages.append(message)
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                return messages, True
            if not message.get("more_body", False):
                return messages, False


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _replay(messages: list[Message], receive: Receive) -> Receive:
    waiting = list(messages)

    async def next_message() -> Message:
        return waiting.pop(0) if waiting else await receive()

    return next_message


async def _answer(
    send: Send, status: int, body: dict[str, Any], headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    content = json.dumps(body).encode()
    fixed = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(content)))
    start = {"type": "http.response.start", "status": status, "headers": [*fixed, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": content})
