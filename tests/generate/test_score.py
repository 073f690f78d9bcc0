"""Scores count answers that equal the reference, whole or by their number."""

import pytest

from halfbyte.errors import DataError
from halfbyte.generate.score import exact_match

ROWS = [
    {"prompt": [{"role": "user", "content": "2+2?"}], "completion": " four "},
    {
        "messages": [
            {"role": "user", "content": "3+3?"},
            {"role": "assistant", "content": "seven"},
        ]
    },
]


def numbers(*pairs):
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]


def test_right_answers_are_counted_and_all_are_shown(taught, tokenizer):
    result = exact_match(taught, tokenizer, ROWS)
    assert (result.exact_match, result.total) == (0.5, 2)
    assert [sample.is_correct for sample in result.samples] == [True, False]
    assert result.samples[1].answer == "six and no more"
    assert result.samples[1].expected == "seven"


def test_a_normaliser_of_the_callers(taught, tokenizer):
    result = exact_match(taught, tokenizer, ROWS, normalise=lambda text: "same")
    assert result.exact_match == 1.0


def test_numbers_are_compared_after_the_mark(taught, tokenizer):
    rows = numbers(("1?", "so it is 2/2=1\n#### 1"), ("10?", "#### 1000"), ("2+2?", "#### 4"))
    result = exact_match(taught, tokenizer, rows, extract="number")
    assert [sample.is_correct for sample in result.samples] == [True, True, False]
    assert exact_match(taught, tokenizer, rows[:2]).exact_match == 0


def test_rows_without_a_reference_are_errors(taught, tokenizer):
    with pytest.raises(DataError, match="no row to score"):
        exact_match(taught, tokenizer, [])
    with pytest.raises(
        DataError, match=r"row 1 has no reference answer: its columns are \['text'\]"
    ):
        exact_match(taught, tokenizer, [{"text": "a"}])
    rows = numbers(("1?", "#### 1"), ("2?", "two"))
    with pytest.raises(DataError, match="row 2 has no number") as caught:
        exact_match(taught, tokenizer, rows, extract="number")
    assert "extract=exact" in caught.value.hint


def test_progress_is_reported(taught, tokenizer):
    done = []
    exact_match(taught, tokenizer, ROWS, batch_size=1, on_done=done.append)
    assert done == [1, 1]
