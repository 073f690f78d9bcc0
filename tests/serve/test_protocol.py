"""What is served is read; what is not is an error, unless it asks for nothing."""

import pytest
from pydantic import ValidationError

from halfbyte.serve.protocol import ChatBody, CompletionBody

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def test_defaults_are_openais():
    body = ChatBody.model_validate(CHAT)
    assert (body.temperature, body.top_p, body.n, body.stream) == (1.0, 1.0, 1, False)
    assert body.most_tokens is None
    assert body.num_top_logprobs is None
    assert CompletionBody(model="m", prompt="a").most_tokens == 16


@pytest.mark.parametrize(
    "neutral",
    [
        {"frequency_penalty": 0.0},
        {"logit_bias": None},
        {"response_format": {"type": "text"}},
        {"user": "me", "metadata": {"a": "b"}},
        {"max_tokens": None, "stop": None, "tools": None, "n": None},
        {"parallel_tool_calls": True},
    ],
    ids=lambda neutral: next(iter(neutral)),
)
def test_what_asks_for_nothing_is_dropped(neutral):
    assert ChatBody.model_validate({**CHAT, **neutral}) == ChatBody.model_validate(CHAT)


@pytest.mark.parametrize(
    "bad",
    [
        {"frequency_penalty": 0.5},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"top_logprobs": 21, "logprobs": True},
        {"max_completion_tokens": 0},
        {"what": 1},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_what_is_not_served_is_an_error(bad):
    with pytest.raises(ValidationError):
        ChatBody.model_validate({**CHAT, **bad})


def test_two_names_for_the_longest_answer():
    assert ChatBody.model_validate({**CHAT, "max_tokens": 3}).most_tokens == 3
    both = {**CHAT, "max_tokens": 3, "max_completion_tokens": 4}
    assert ChatBody.model_validate(both).most_tokens == 4


def test_stops_and_logprobs():
    body = ChatBody.model_validate({**CHAT, "stop": "x", "logprobs": True})
    assert body.stops == ("x",)
    assert body.num_top_logprobs == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_in_all_forms(prompt, expected):
    assert CompletionBody(model="m", prompt=prompt).prompts == expected
