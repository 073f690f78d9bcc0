"""Many answers at once are the answers one by one, in the order of the prompts."""

import pytest

from halfbyte.errors import ConfigError
from halfbyte.generate.batch import generate_batch
from halfbyte.generate.generate import generate

QUESTIONS = ["3+3?", "1?", "2+2?", "10?"]


def prompts(questions):
    return [[{"role": "user", "content": question}] for question in questions]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_answer_as_one_by_one(taught, tokenizer, batch_size):
    expected = [generate(taught, tokenizer, prompt) for prompt in prompts(QUESTIONS)]
    done = []
    answers = generate_batch(
        taught, tokenizer, prompts(QUESTIONS), batch_size=batch_size, on_done=done.append
    )
    assert answers == expected
    assert sum(done) == len(QUESTIONS)


def test_plain_texts_and_no_prompt_at_all(taught, tokenizer):
    assert generate_batch(taught, tokenizer, []) == []
    assert len(generate_batch(taught, tokenizer, ["a", "bc"], max_new_tokens=2)) == 2


def test_a_prompt_that_is_too_long_is_an_error(taught, tokenizer):
    with pytest.raises(ConfigError, match="positions"):
        generate_batch(taught, tokenizer, ["a", "b" * 300])
