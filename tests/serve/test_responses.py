"""The objects are read by openai's own types, and say the same whole as in chunks."""

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from transformers import AutoTokenizer

from halfbyte.serve.choose import TokenChoice, TokenLogprob
from halfbyte.serve.responses import ChatResponses, CompletionResponses, error_body, usage
from halfbyte.serve.text import Piece


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def pieces(tokenizer):
    ids = tokenizer("abcé").input_ids
    choices = [TokenChoice(TokenLogprob(i, -0.5), (TokenLogprob(ids[0], -0.1),)) for i in ids]
    return [Piece("a", tuple(choices[:1])), Piece("bcé", tuple(choices[1:])), Piece()]


def test_chat_objects(tokenizer, pieces):
    responses = ChatResponses("m", tokenizer, has_logprobs=True)
    whole = responses.whole([responses.choice(0, pieces, "stop")], usage(3, 4))
    parsed = ChatCompletion.model_validate(whole, strict=True)
    assert parsed.choices[0].message.content == "abcé"
    assert parsed.usage.total_tokens == 7
    content = parsed.choices[0].logprobs.content
    assert [entry.token for entry in content[:3]] == ["a", "b", "c"]
    assert content[0].bytes == [97]
    assert content[3].bytes is None  # one half of é

    chunks = [responses.chunk([responses.delta(0, piece, None)]) for piece in pieces]
    read = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in read) == "abcé"
    assert {chunk.id for chunk in read} == {parsed.id}
    opening = responses.opening(1)
    assert (opening["index"], opening["delta"]["role"]) == (1, "assistant")


def test_completion_objects_count_offsets_through_chunks(tokenizer, pieces):
    responses = CompletionResponses("m", tokenizer, has_logprobs=True)
    assert responses.opening(0) is None
    deltas = [responses.delta(0, piece, None) for piece in pieces]
    assert [delta["logprobs"]["text_offset"] for delta in deltas] == [[0], [1, 2, 3, 4], []]
    whole = responses.whole([responses.choice(1, pieces, "length")], usage(1, 2))
    assert Completion.model_validate(whole, strict=True).choices[0].text == "abcé"


def test_without_logprobs_there_are_none(tokenizer, pieces):
    for kind in (ChatResponses, CompletionResponses):
        responses = kind("m", tokenizer, has_logprobs=False)
        assert responses.choice(0, pieces, "stop")["logprobs"] is None


def test_errors_have_all_four_fields():
    assert error_body("no", param="n") == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": None}
    }
