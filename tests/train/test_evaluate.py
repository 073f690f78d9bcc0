"""Held-out loss is the mean over supervised tokens, however the rows are batched."""

import math

import pytest
import torch

from halfbyte.errors import DataError
from halfbyte.train.evaluate import evaluate

LENGTHS = [5, 9, 12, 7, 20]


def reference(model, rows):
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            losses = torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1].double(), labels, reduction="none", ignore_index=-100
            )
            total += losses.sum().item()
            tokens += int((labels != -100).sum())
    return total / tokens, tokens


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_loss_is_the_mean_over_tokens(make_lora, tokenizer, rows_of, batch_size):
    model, rows = make_lora(lora_dropout=0.5), rows_of(LENGTHS)
    loss, tokens = reference(model.eval(), rows)
    model.train()  # dropout must be off nevertheless
    result = evaluate(model, tokenizer, rows, batch_size=batch_size)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.tokens == tokens
    assert model.training


def test_plain_model_without_adapters(make_llama, tokenizer, rows_of):
    model, rows = make_llama().eval(), rows_of(LENGTHS)
    assert evaluate(model, tokenizer, rows).loss == pytest.approx(
        reference(model, rows)[0], rel=1e-6
    )


def test_text_rows_are_tokenized(make_llama, tokenizer):
    model = make_llama(vocab_size=len(tokenizer))
    result = evaluate(model, tokenizer, [{"text": "one two"}, {"text": "three"}])
    assert result.tokens > 10


def test_nothing_supervised_is_an_error(make_llama, tokenizer, rows_of):
    rows = rows_of([2, 2])  # prompts only
    with pytest.raises(DataError, match="none of the 2 rows"):
        evaluate(make_llama(), tokenizer, rows)
