"""Greedy answers to many prompts at once.

Prompts of like length share a batch, padded on the left, so that all answers begin at the same
position. A batch ends when its last answer has ended.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.generate.decoding import Decoding
from halfbyte.generate.dense import dense_weights
from halfbyte.generate.generate import evaluating
from halfbyte.generate.prompts import Prompt, pad_token_id, prompt_ids, room_for, stop_token_ids
from halfbyte.generate.sampling import Sampling


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 128,
    on_done: Callable[[int], None] | None = None,
    decoding: Decoding | None = None,
) -> list[str]:
    """Return the likeliest-token answer to each prompt, in the order of the prompts.

    Args:
        model: A model that `load` returned, with or without an adapter.
        tokenizer: Its tokenizer.
        prompts: Plain texts or lists of messages, as for `generate`.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts that are answered together.
        on_done: Called with the number of answers that have just been finished.
        decoding: Give the same one to every call, and the fused decoder is made once.

    Raises:
        ConfigError: a prompt does not fit into the model.
        DataError: a prompt cannot be rendered.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    answers = [""] * len(ids)
    decoding = decoding or Decoding()
    with evaluating(model), dense_weights(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [ids[index] for index in chosen]
            texts = _answer(model, tokenizer, rows, max_new_tokens, decoding)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
            if on_done is not None:
                on_done(len(chosen))
    return answers


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    max_new_tokens: int,
    decoding: Decoding,
) -> list[str]:
    """Answer one batch of token rows, the longest of which sets the width."""
    width, pad = max(len(row) for row in rows), pad_token_id(tokenizer)
    sampling = Sampling(max_new_tokens=room_for(model, width, max_new_tokens))
    stops = stop_token_ids(model, tokenizer)
    answers = decoding.answer(model, rows, sampling, stops)
    if answers is not None:
        return list(tokenizer.batch_decode(answers, skip_special_tokens=True))
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    config = sampling.generation_config(stop_token_ids=stops, pad_token_id=pad)
    output = cast(Any, model).generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
    )
    return list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))
