"""Errors as OpenAI's clients expect them: a status, and one object that says what was wrong."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from halfbyte.errors import HalfbyteError
from halfbyte.serve.catalog import UnknownModelError
from halfbyte.serve.engine import QueueFullError, StoppingError
from halfbyte.serve.exchange import GenerationError
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.prompt import ContextLengthError
from halfbyte.serve.responses import error_body

_LOG = logging.getLogger(__name__)
_RETRY_AFTER_SECONDS = 1


def describe_error(error: HalfbyteError) -> tuple[int, dict[str, Any]]:
    """Return the status and the body for an error of ours."""
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    if isinstance(error, UnknownModelError):
        return 404, error_body(message, param="model", code="model_not_found")
    if isinstance(error, QueueFullError):
        return 429, error_body(message, kind="rate_limit_error", code="queue_full")
    if isinstance(error, StoppingError):
        return 503, error_body(message, kind="server_error", code="stopping")
    if isinstance(error, GenerationError):
        status = 500 if error.failure == "error" else 503
        return status, error_body(message, kind="server_error", code=error.failure)
    if isinstance(error, ContextLengthError):
        return 400, error_body(message, param="messages", code="context_length_exceeded")
    return 400, error_body(message)


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Let the application answer every error in OpenAI's form, and count it."""

    def answer(status: int, body: dict[str, Any]) -> JSONResponse:
        metrics.refused.labels(str(status)).inc()
        is_busy = status in (429, 503)
        return JSONResponse(
            body, status, headers={"retry-after": str(_RETRY_AFTER_SECONDS)} if is_busy else None
        )

    @app.exception_handler(HalfbyteError)
    async def of_ours(_: Request, error: HalfbyteError) -> JSONResponse:
        return answer(*describe_error(error))

    @app.exception_handler(PermissionError)
    async def not_allowed(_: Request, error: PermissionError) -> JSONResponse:
        return answer(403, error_body(str(error), kind="permission_error"))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(400, _validation_body(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, error_body(str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        _LOG.error("a request failed", exc_info=error)
        body = error_body("the server failed; its log says why", kind="server_error")
        return answer(500, body)


def _validation_body(first: Any) -> dict[str, Any]:
    """Return the body for pydantic's first complaint."""
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return error_body(f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        message = f"{place} = {first['input']!r:.200} is not supported"
        return error_body(message, param=place, code="unsupported_parameter")
    return error_body(f"{place}: {first['msg']}" if place else first["msg"], param=place or None)
