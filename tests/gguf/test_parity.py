"""Prompts of a file are compared with those of training, and what differs is shown."""

import pytest

from halfbyte.data.formats import Example
from halfbyte.errors import DataError
from halfbyte.gguf.parity import check_parity


def talk(*contents):
    roles = ["user", "assistant"] * len(contents)
    return Example([{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)])


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_every_turns_prompt_is_compared(write_tokenizer, make_byte_level, make_sentencepiece, kind):
    is_bytes = kind == "byte level"
    tokenizer = make_byte_level() if is_bytes else make_sentencepiece(prefix=False)
    examples = [talk("hi", "ho", "the 12", "on"), talk("a\n\n", " b ")]
    parity = check_parity(write_tokenizer(tokenizer), tokenizer, examples)
    assert parity.prompts == 3
    assert not parity.differences
    assert not parity.is_sample


def test_made_up_ones_stand_in_for_data(write_tokenizer, make_byte_level):
    tokenizer = make_byte_level()
    parity = check_parity(write_tokenizer(tokenizer), tokenizer)
    assert parity.is_sample
    assert parity.prompts == 5


def test_templates_that_rewrite_earlier_turns_are_compared_turn_by_turn(
    write_tokenizer, make_byte_level
):
    tokenizer = make_byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}(last){% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    parity = check_parity(write_tokenizer(tokenizer), tokenizer, [talk("a", "b", "c", "d")])
    assert parity.prompts == 2
    assert not parity.differences


def test_a_second_bos_is_a_difference(write_tokenizer, make_byte_level):
    tokenizer = make_byte_level()
    path = write_tokenizer(tokenizer, add_bos=True)
    parity = check_parity(path, tokenizer, [talk("a", "b")])
    (difference,) = parity.differences
    assert difference.position == 0
    assert difference.where == "conversation 1, message 2"
    assert difference.served.startswith("<|im_end|>|<|im_start|>")
    assert difference.trained.startswith("<|im_start|>|u|s|e|r")


def test_another_way_to_cut_text_is_a_difference(write_tokenizer, make_byte_level):
    tokenizer = make_byte_level()
    parity = check_parity(write_tokenizer(tokenizer, merges=["t h"]), tokenizer, [talk("the", "b")])
    assert "the" in parity.differences[0].trained
    assert "th|e" in str(parity)


def test_a_stop_that_the_file_does_not_know_is_a_difference(write_tokenizer, make_byte_level):
    tokenizer = make_byte_level()
    special = {"bos": 256, "eos": 256}
    parity = check_parity(write_tokenizer(tokenizer, special=special), tokenizer, [talk("a", "b")])
    (difference,) = parity.differences
    assert difference.where.endswith("its end")
    assert (difference.trained, difference.served) == ("<|im_end|>", "<|endoftext|>")


def test_special_tokens_in_messages_are_counted_apart(write_tokenizer, make_byte_level):
    tokenizer = make_byte_level()
    parity = check_parity(
        write_tokenizer(tokenizer), tokenizer, [talk("say <|im_end|>", "b"), talk("a", "b")]
    )
    assert parity.prompts == 1
    assert list(parity.skipped.values()) == [1]


def test_documents_are_compared(write_tokenizer, make_byte_level):
    tokenizer = make_byte_level()
    tokenizer.chat_template = None
    path = write_tokenizer(tokenizer)
    assert not check_parity(path, tokenizer, [Example([], text="the end\n")]).differences
    assert check_parity(path, tokenizer).prompts == 1


def test_data_that_the_template_refuses_are_an_error(write_tokenizer, make_byte_level):
    tokenizer = make_byte_level()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    path = write_tokenizer(make_byte_level())
    with pytest.raises(DataError, match="conversation 1"):
        check_parity(path, tokenizer, [talk("a", "b")])
