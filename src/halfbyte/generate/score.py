"""How many generated answers are right."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import DataError
from halfbyte.generate.batch import generate_batch
from halfbyte.generate.prompts import Prompt

Extract = Literal["exact", "number"]
_NUMBER = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")
_MARGIN_TOKENS = 16


@dataclass(frozen=True)
class Sample:
    """One question, what was expected, and what came."""

    prompt: Prompt
    expected: str
    answer: str
    is_correct: bool


@dataclass(frozen=True)
class ScoreResult:
    """The share of right answers, and every answer.

    Args:
        exact_match: Right answers / all answers, from 0 to 1.
        total: Answers that were scored.
        samples: Each of them, in the order of the rows.
    """

    exact_match: float
    total: int
    samples: list[Sample]


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    extract: Extract = "exact",
    normalise: Callable[[str], str] = str.strip,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
) -> ScoreResult:
    """Answer every row greedily, and count the answers that equal the reference.

    Args:
        model: A model that `load` returned, with or without an adapter.
        tokenizer: Its tokenizer.
        rows: `{"messages": [...]}` whose last turn is the reference, or
            `{"prompt": ..., "completion": ...}`.
        extract: "exact" compares the whole answer; "number" the number after the last `####`
            (GSM8K's form).
        normalise: Applied to the answer and the reference before they are compared.
        max_new_tokens: Longest answer; the longest reference and 16 tokens more by default.
        batch_size: Questions that are answered together.
        on_done: Called with the number of answers that have just been finished.

    Raises:
        DataError: there is no row, or a row has no reference.
    """
    pairs = [_question(row, number) for number, row in enumerate(rows, start=1)]
    if not pairs:
        raise DataError("there is no row to score", hint="give a file with at least one row")
    wanted = [_extract(reference, extract) for _, reference in pairs]
    for number, value in enumerate(wanted, start=1):
        if value is None:
            raise DataError(
                f"the reference of row {number} has no number after '####'",
                hint="score it with extract=exact",
            )
    if max_new_tokens is None:
        references = [reference for _, reference in pairs]
        max_new_tokens = _MARGIN_TOKENS + max(len(ids) for ids in tokenizer(references).input_ids)
    answers = generate_batch(
        model,
        tokenizer,
        [prompt for prompt, _ in pairs],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_done=on_done,
    )
    samples = []
    for (prompt, reference), answer, value in zip(pairs, answers, wanted, strict=True):
        got = _extract(answer, extract)
        is_correct = got is not None and normalise(got) == normalise(str(value))
        samples.append(Sample(prompt, reference, answer, is_correct))
    right = sum(sample.is_correct for sample in samples)
    return ScoreResult(right / len(samples), len(samples), samples)


def _extract(text: str, how: Extract) -> str | None:
    """Return the part that is compared, None where there is none."""
    if how == "exact":
        return text
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def _question(row: Mapping[str, Any], number: int) -> tuple[Prompt, str]:
    """Return (prompt, reference) of one row."""
    messages = row.get("messages")
    if messages and messages[-1]["role"] == "assistant":
        return list(messages[:-1]), str(messages[-1]["content"])
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        reference = completion if isinstance(completion, str) else completion[-1]["content"]
        return prompt if isinstance(prompt, str) else list(prompt), str(reference)
    raise DataError(
        f"row {number} has no reference answer: its columns are {sorted(row)}",
        hint="a row needs `messages` that end with an assistant turn, or `prompt` and `completion`",
    )
