"""Prompts become the ids that training saw, and answers end where training ended them."""

import copy

import pytest

from halfbyte.errors import ConfigError, DataError
from halfbyte.generate.prompts import (
    end_of_turn_id,
    pad_token_id,
    prompt_ids,
    room_for,
    stop_token_ids,
)


def test_messages_are_rendered_with_the_template(tokenizer):
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_plain_text_is_taken_as_it_is(tokenizer):
    assert tokenizer.decode(prompt_ids(tokenizer, "Once upon")) == "Once upon"


def test_without_a_template_messages_are_an_error(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        prompt_ids(bare, [{"role": "user", "content": "Hi"}])
    assert end_of_turn_id(bare) is None


def test_a_template_that_never_ends_is_stopped(tokenizer):
    bomb = copy.deepcopy(tokenizer)
    bomb.chat_template = "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"
    with pytest.raises(DataError, match="was stopped"):
        prompt_ids(bomb, [{"role": "user", "content": "Hi"}])


def test_a_template_that_refuses_is_an_error_that_says_so(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(DataError, match="refuses this conversation: no system message"):
        prompt_ids(strict, [{"role": "system", "content": "Hi"}])


def test_an_empty_prompt_without_bos_is_an_error(tokenizer):
    with pytest.raises(DataError, match="empty"):
        prompt_ids(tokenizer, "")


def test_the_templates_end_of_turn_stops_too(taught, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    end_of_text, end_of_turn = other.eos_token_id, tokenizer.eos_token_id
    assert end_of_turn_id(other) == end_of_turn
    assert {end_of_text, end_of_turn} <= set(stop_token_ids(taught, other))


def test_answers_fit_into_the_models_positions(taught, tokenizer):
    assert room_for(taught, 250, 100) == 6
    assert room_for(taught, 10, 100) == 100
    with pytest.raises(ConfigError, match="256 tokens, the model has 256 positions"):
        room_for(taught, 256, 1)


def test_padding_needs_no_padding_token(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    assert pad_token_id(other) == other.eos_token_id
