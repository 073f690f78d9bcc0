"""From a request's body to answers that can be queued."""

import functools
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halfbyte.errors import ConfigError, DataError
from halfbyte.generate.prompts import prompt_ids
from halfbyte.generate.sampling import Sampling
from halfbyte.serve.adapter import ServedModel
from halfbyte.serve.answer import Answer, Event
from halfbyte.serve.protocol import ChatBody, CompletionBody

_TAKEN = {"chat_template", "tokenize", "add_generation_prompt", "messages", "conversation", "tools"}


class ContextLengthError(ConfigError):
    """A prompt with its answer does not fit."""


def chat_prompt(body: ChatBody, model: ServedModel) -> list[int]:
    """Return the tokens of a conversation, rendered as the model's template says.

    Raises:
        DataError: the model has no template, or it refuses the messages.
        ConfigError: a message or a template's argument is of a kind that is not served.
    """
    if taken := _TAKEN & set(body.chat_template_kwargs):
        raise ConfigError(f"chat_template_kwargs cannot set {sorted(taken)}")
    tools = body.tools if body.tool_choice == "auto" else None
    messages = [_message(message, index) for index, message in enumerate(body.messages)]
    return prompt_ids(model.tokenizer, messages, tools=tools, **body.chat_template_kwargs)


def completion_prompt(prompt: str | list[int], model: ServedModel, vocabulary: int) -> list[int]:
    """Return the tokens of a plain prompt.

    Raises:
        DataError: it is empty, or a token is outside the vocabulary.
    """
    if isinstance(prompt, str):
        return prompt_ids(model.tokenizer, prompt)
    if not prompt or not all(0 <= token < vocabulary for token in prompt):
        raise DataError(f"token ids of a prompt should be at least one, from 0 to {vocabulary - 1}")
    return prompt


def make_answers(
    body: ChatBody | CompletionBody,
    model: ServedModel,
    prompts: Sequence[list[int]],
    emit: Callable[[int, Event], None],
    *,
    max_model_len: int,
    timeout: float,
) -> list[Answer]:
    """Return n answers to each prompt, in the order of OpenAI's choices.

    Args:
        body: What was asked.
        model: Who answers.
        prompts: Token ids.
        emit: Takes the index of a choice and its news.
        max_model_len: Longest prompt with its answer.
        timeout: Seconds until they must be complete.

    Raises:
        ContextLengthError: a prompt with its answer is longer than that.
    """
    seed = random.SystemRandom().getrandbits(48) if body.seed is None else body.seed
    deadline = time.monotonic() + timeout
    answers = []
    for index in range(len(prompts) * body.n):
        ids = prompts[index // body.n]
        sampling = Sampling(
            max_new_tokens=_room(len(ids), body.most_tokens, max_model_len),
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            seed=seed + index % body.n,
        )
        answers.append(
            Answer(
                model,
                ids,
                sampling,
                functools.partial(emit, index),
                stop=body.stops,
                num_top_logprobs=body.num_top_logprobs,
                deadline=deadline,
            )
        )
    return answers


def _room(num_prompt_tokens: int, wanted: int | None, max_model_len: int) -> int:
    room = max_model_len - num_prompt_tokens
    if room < (wanted or 1):
        raise ContextLengthError(
            f"the longest context is {max_model_len} tokens, but the prompt has "
            f"{num_prompt_tokens} and {wanted or 1} were asked for"
        )
    return wanted or room


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a message as templates expect it: text as a string, arguments as an object."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ConfigError(f"messages[{index}] should have a role, got {role!r}")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ConfigError(f"messages[{index}] holds more than text, which is not served")
        content = "".join(str(part) for part in parts)
    if content is not None and not isinstance(content, str):
        raise ConfigError(f"messages[{index}].content should be text, got {type(content).__name__}")
    if content is None and not message.get("tool_calls"):
        raise ConfigError(f"messages[{index}] has no content")
    ready = {**message, "content": content or ""}
    if message.get("tool_calls"):
        ready["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return ready


def _tool_call(call: Any) -> Any:
    """Return a call with its arguments as an object: OpenAI sends JSON, templates want that."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
