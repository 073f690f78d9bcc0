"""The pieces add up to the text; half characters and stop strings never get out."""

import itertools

import pytest
from transformers import AutoTokenizer

from halfbyte.demo.base import base_path
from halfbyte.serve.choose import TokenChoice, TokenLogprob
from halfbyte.serve.text import TextStream

TEXT = "Grüße, 世界! 👩‍👩‍👧 and so on"


@pytest.fixture(scope="module")
def letters(tiny_base):
    """A tokenizer of single bytes: every character falls on several tokens."""
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(base_path())


@pytest.fixture(params=["letters", "words"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def run(stream, ids):
    """Push tokens until the stream stops; return what came, one piece a token and the end."""
    pieces = []
    for token in ids:
        pieces.append(stream.push(token, TokenChoice(TokenLogprob(token, -1.0), ())))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()]


def test_pieces_add_up_and_are_whole_characters(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    pieces = run(TextStream(tokenizer), ids)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)
    assert [choice.token.token_id for piece in pieces for choice in piece.choices] == ids
    assert sum(bool(piece.text) for piece in pieces) > 5


def test_a_character_that_stays_unfinished_comes_at_the_end(letters):
    ids = letters("ab世", add_special_tokens=False).input_ids[:-1]
    pieces = run(TextStream(letters), ids)
    assert [piece.text for piece in pieces] == ["a", "b", "", "", letters.decode(ids)[2:]]


def test_special_tokens_have_no_text(letters):
    stream = TextStream(letters)
    assert stream.push(letters.eos_token_id).text == ""
    assert stream.push(letters("a").input_ids[0]).text == "a"


@pytest.mark.parametrize("stop", ["界", "so", "!", "Grüße, ", "👧", "d so on"])
def test_stop_strings_cut_wherever_tokens_end(tokenizer, stop):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    stream = TextStream(tokenizer, ["never there", stop])
    pieces = run(stream, ids)
    assert stream.is_stopped
    assert "".join(piece.text for piece in pieces) == TEXT[: TEXT.index(stop)]


def test_the_first_of_several_stop_strings_cuts(letters):
    for stops in itertools.permutations(["cd", "bcde", "e"]):
        stream = TextStream(letters, stops)
        pieces = run(stream, letters("abcdef").input_ids)
        assert "".join(piece.text for piece in pieces) == "ab"  # cd is whole before bcde is


def test_what_only_begins_a_stop_string_is_held_and_then_given(letters):
    stream = TextStream(letters, ["abcd"])
    pieces = run(stream, letters("xabcabc").input_ids)
    assert [piece.text for piece in pieces] == ["x", "", "", "", "abc", "", "", "abc"]
    assert not stream.is_stopped


def test_tokens_of_a_stop_string_are_not_reported(letters):
    ids = letters("xyab!").input_ids
    pieces = run(TextStream(letters, ["ab"]), ids)
    assert [choice.token.token_id for piece in pieces for choice in piece.choices] == ids[:2]
