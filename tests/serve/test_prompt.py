"""Bodies become the tokens that the model's template makes of them."""

import copy
import dataclasses

import pytest

from halfbyte.errors import ConfigError, DataError
from halfbyte.serve.prompt import (
    ContextLengthError,
    chat_prompt,
    completion_prompt,
    make_answers,
)
from halfbyte.serve.protocol import ChatBody, CompletionBody

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments.a + 1 }}{% endfor %}"
    "{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}|{% endfor %}"
    "{% if loud %}LOUD{% endif %}"
)


@pytest.fixture
def model(service):
    """The base, with a template that shows what it is given."""
    base = copy.copy(service.catalog.names()[0])
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return dataclasses.replace(base, tokenizer=tokenizer)


def rendered(model, messages, **settings):
    body = ChatBody(model="base", messages=messages, **settings)
    return model.tokenizer.decode(chat_prompt(body, model))


def test_messages_tools_and_arguments_reach_the_template(model):
    hi = {"role": "user", "content": "hi"}
    assert rendered(model, [hi]) == "user:hi|"
    assert rendered(model, [hi], tools=[TOOL]) == "[add]user:hi|"
    assert rendered(model, [hi], tools=[TOOL], tool_choice="none") == "user:hi|"
    assert rendered(model, [hi], chat_template_kwargs={"loud": True}) == "user:hi|LOUD"
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert rendered(model, [{"role": "user", "content": parts}]) == "user:hi|"


def test_arguments_of_calls_are_objects_for_the_template(model):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 4}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert rendered(model, [said]) == "assistant:5|"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": "x"}, ConfigError),
        ({"role": "user"}, ConfigError),
        ({"role": "user", "content": 3}, ConfigError),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ConfigError),
        ({"role": "bad", "content": "x"}, DataError),
    ],
)
def test_messages_that_cannot_be_rendered_are_errors(model, message, error):
    with pytest.raises(error):
        rendered(model, [message])


def test_the_template_itself_cannot_be_sent(model):
    with pytest.raises(ConfigError, match="chat_template"):
        rendered(
            model,
            [{"role": "user", "content": "x"}],
            chat_template_kwargs={"chat_template": "{{ 1 }}"},
        )


def test_without_a_template_there_is_no_chat(model):
    model.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        rendered(model, [{"role": "user", "content": "x"}])


def test_token_ids_are_checked(model):
    assert completion_prompt([3, 4], model, 5) == [3, 4]
    with pytest.raises(DataError, match="from 0 to 4"):
        completion_prompt([3, 5], model, 5)


def answers(model, **settings):
    body = CompletionBody(model="base", prompt="a", **settings)
    return make_answers(
        body, model, [[1] * 4, [2] * 6], lambda *_: None, max_model_len=10, timeout=1
    )


def test_choices_are_counted_prompt_by_prompt(model):
    made = answers(model, n=2, seed=5, max_tokens=3, top_k=-1)
    assert [answer.prompt_ids[0] for answer in made] == [1, 1, 2, 2]
    assert [answer.sampling.seed for answer in made] == [5, 6, 5, 6]
    assert {answer.sampling.max_new_tokens for answer in made} == {3}


def test_what_does_not_fit_is_an_error_and_no_limit_means_the_room(model):
    with pytest.raises(ContextLengthError, match="the prompt has 6 and 5 were asked for"):
        answers(model, max_tokens=5)
    body = ChatBody(model="base", messages=[{"role": "user", "content": "x"}])
    made = make_answers(body, model, [[1] * 4], lambda *_: None, max_model_len=10, timeout=1)
    assert made[0].sampling.max_new_tokens == 6
