"""The fused decoder says what transformers says: settings, seeds, streams and batches."""

import pytest
import torch

from halfbyte.generate import decoding as decoding_module
from halfbyte.generate.batch import generate_batch
from halfbyte.generate.decoding import Decoding
from halfbyte.generate.generate import generate

QUESTIONS = ["3+3?", "1?", "2+2?", "10?"]


def prompt(question):
    return [{"role": "user", "content": question}]


@pytest.fixture
def counting(monkeypatch, taught):
    """Fail where transformers' generate is asked."""

    def refuse(*_, **__):
        raise AssertionError("transformers was asked")

    def forbid():
        monkeypatch.setattr(taught, "generate", refuse)

    return forbid


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_new_tokens": 3},
        {"temperature": 1.5, "seed": 3, "max_new_tokens": 20},
        {"temperature": 2.0, "top_k": 5, "top_p": 0.8, "seed": 1, "max_new_tokens": 20},
        {"repetition_penalty": 1.3, "max_new_tokens": 20},
    ],
)
def test_settings_and_seeds_mean_the_same(taught, tokenizer, counting, settings):
    expected = generate(taught, tokenizer, prompt("3+3?"), **settings)
    counting()
    pieces = []
    answer = generate(
        taught, tokenizer, prompt("3+3?"),
        stream=pieces.append, decoding=Decoding(anywhere=True), **settings,
    )  # fmt: skip
    assert answer == expected
    assert "".join(pieces) == expected
    assert len(pieces) > 1 or len(expected.split()) < 3


def test_batches_answer_alike_with_one_decoder(taught, tokenizer, counting):
    prompts = [prompt(question) for question in QUESTIONS]
    expected = generate_batch(taught, tokenizer, prompts)
    counting()
    decoding = Decoding(anywhere=True)
    assert generate_batch(taught, tokenizer, prompts, batch_size=3, decoding=decoding) == expected
    kept = decoding._decoder
    assert generate_batch(taught, tokenizer, prompts, batch_size=3, decoding=decoding) == expected
    assert decoding._decoder is kept


def test_why_transformers_answers_is_told_once(taught, tokenizer, monkeypatch):
    monkeypatch.setattr(decoding_module, "obstacle", lambda model: "it has wings")
    told = []
    decoding = Decoding(anywhere=True, tell=told.append)
    for _ in range(2):
        assert generate(taught, tokenizer, prompt("2+2?"), decoding=decoding) == "four"
    assert told == ["it has wings"]


def test_without_a_gpu_transformers_answers(taught, tokenizer):
    decoding = Decoding()
    assert generate(taught, tokenizer, prompt("2+2?"), decoding=decoding) == "four"
    assert decoding.answer(taught.to("cpu"), [[1]], None, []) is None or torch.cuda.is_available()
