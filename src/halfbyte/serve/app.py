"""The HTTP interface: OpenAI's routes, vLLM's for adapters, health and metrics."""

import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from halfbyte.errors import AdapterError, ConfigError
from halfbyte.serve.adapter import ServedModel
from halfbyte.serve.answer import Event
from halfbyte.serve.errors import add_error_handlers, describe_error
from halfbyte.serve.exchange import ClientGoneError, Exchange, GenerationError, unless_gone
from halfbyte.serve.guard import Guard
from halfbyte.serve.prompt import chat_prompt, completion_prompt, make_answers
from halfbyte.serve.protocol import (
    ChatBody,
    CompletionBody,
    LoadAdapterBody,
    UnloadAdapterBody,
)
from halfbyte.serve.responses import ChatResponses, CompletionResponses, Responses, usage
from halfbyte.serve.service import Service

_LOG = logging.getLogger(__name__)
_CLIENT_GONE = 499  # nginx' status; nobody reads it


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    adapter_dir: Path | None = None,
    request_timeout: float = 600.0,
    max_body_bytes: int = 4 * 2**20,
) -> FastAPI:
    """Return the application; it does not close the service.

    Args:
        service: What answers.
        api_key: What clients must send as `Authorization: Bearer`; None: nothing.
        adapter_dir: Folder below which adapters may be loaded while the server runs; None: nowhere.
        request_timeout: Seconds from a request's arrival to the last token of its answers.
        max_body_bytes: Largest request.
    """
    app = FastAPI(title="Halfbyte", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes)
    add_error_handlers(app, service.metrics)
    _add_generation(app, service, request_timeout)
    _add_adapters(app, service, adapter_dir)
    _add_operation(app, service)
    return app


def _add_generation(app: FastAPI, service: Service, timeout: float) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        return await _generate(request, service, body, timeout)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await _generate(request, service, body, timeout)


def _add_adapters(app: FastAPI, service: Service, adapter_dir: Path | None) -> None:
    def check_is_allowed() -> Path:
        if adapter_dir is None:
            raise PermissionError("start the server with --adapter-dir to change adapters")
        return adapter_dir.resolve()

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapterBody) -> Response:
        root = check_is_allowed()
        folder = (root / body.lora_path).resolve()
        if not folder.is_relative_to(root) or not folder.is_dir():
            raise AdapterError(f"lora_path should be a folder below {root}")
        load = service.catalog.load
        await run_in_threadpool(load, body.lora_name, folder, replace=body.load_inplace)
        _LOG.info("adapter %r loaded from %s", body.lora_name, folder)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapterBody) -> Response:
        check_is_allowed()
        service.catalog.unload(body.lora_name)
        _LOG.info("adapter %r unloaded", body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_operation(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def card(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": started,
            "owned_by": "halfbyte",
            "root": str(model.path),
            "parent": model.parent,
            "max_model_len": service.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(model) for model in service.catalog.names()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        found = service.catalog.hold(name)
        found.let_go()
        return card(found)

    @app.get("/health")
    async def health() -> Response:
        is_well = service.engine.is_alive and not service.engine.is_refusing
        return JSONResponse({"status": "ok" if is_well else "stopping"}, 200 if is_well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _generate(
    request: Request, service: Service, body: ChatBody | CompletionBody, timeout: float
) -> Response:
    """Queue the answers to a request, and return the response, whole or as a stream."""
    if body.stream_options is not None and not body.stream:
        raise ConfigError("stream_options goes with stream: true")
    exchange = Exchange()
    model = service.catalog.hold(body.model)
    try:
        prompts = _prompts(body, model, service.vocabulary)
        exchange.answers = make_answers(
            body, model, prompts, exchange.emit,
            max_model_len=service.max_model_len, timeout=timeout,
        )  # fmt: skip
        kind = ChatResponses if isinstance(body, ChatBody) else CompletionResponses
        has_logprobs = body.num_top_logprobs is not None
        responses: Responses = kind(body.model, model.tokenizer, has_logprobs=has_logprobs)
        service.engine.submit(exchange.answers)
    finally:
        model.let_go()
    num_prompt_tokens = sum(len(ids) for ids in prompts)
    try:
        if not body.stream:
            whole = _whole(exchange, responses, num_prompt_tokens)
            return JSONResponse(await unless_gone(request, whole))
        events = exchange.events()
        # Until the first token an error still has a status of its own.
        first = await unless_gone(request, _next(events))
    except ClientGoneError:
        exchange.cancel()
        return Response(status_code=_CLIENT_GONE)
    except BaseException:
        exchange.cancel()
        raise
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    stream = _stream(exchange, first, events, responses, num_prompt_tokens if has_usage else None)
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


def _prompts(
    body: ChatBody | CompletionBody, model: ServedModel, vocabulary: int
) -> list[list[int]]:
    if isinstance(body, ChatBody):
        return [chat_prompt(body, model)]
    return [completion_prompt(prompt, model, vocabulary) for prompt in body.prompts]


async def _next(events: AsyncIterator[tuple[int, Event]]) -> tuple[int, Event]:
    return await anext(events)


async def _whole(
    exchange: Exchange, responses: Responses, num_prompt_tokens: int
) -> dict[str, Any]:
    pieces: list[list[Any]] = [[] for _ in exchange.answers]
    last: list[Event] = [Event() for _ in exchange.answers]
    async for index, event in exchange.events():
        pieces[index].append(event.piece)
        last[index] = event
    choices = [
        responses.choice(index, pieces[index], event.finish_reason)
        for index, event in enumerate(last)
    ]
    return responses.whole(
        choices, usage(num_prompt_tokens, sum(event.num_tokens for event in last))
    )


async def _stream(
    exchange: Exchange,
    first: tuple[int, Event],
    events: AsyncIterator[tuple[int, Event]],
    responses: Responses,
    num_prompt_tokens: int | None,
) -> AsyncIterator[str]:
    """Yield server-sent events; usage comes last where the prompt's tokens are given."""
    num_tokens = dict.fromkeys(range(len(exchange.answers)), 0)

    def told(index: int, event: Event) -> str:
        num_tokens[index] = event.num_tokens
        return _sse(responses.chunk([responses.delta(index, event.piece, event.finish_reason)]))

    try:
        for index in num_tokens:
            if (opening := responses.opening(index)) is not None:
                yield _sse(responses.chunk([opening]))
        yield told(*first)
        async for index, event in events:
            yield told(index, event)
        if num_prompt_tokens is not None:
            used = usage(num_prompt_tokens, sum(num_tokens.values()))
            yield _sse(responses.chunk([], used))
        yield "data: [DONE]\n\n"
    except GenerationError as error:
        yield _sse(describe_error(error)[1])
    finally:
        exchange.cancel()


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
