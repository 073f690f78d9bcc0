"""The embedded base: small, complete, loadable, and its tokenizer does not lose a byte."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.demo.base import base_path

MESSAGES = [
    {"role": "user", "content": "Count the books"},
    {"role": "assistant", "content": "select count(*) from books"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are welcome"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_path())


def test_everything_is_there_and_under_12_mb():
    files = {path.name: path.stat().st_size for path in base_path().iterdir()}
    wanted = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert wanted | {"tokenizer_config.json", "chat_template.jinja", "README.md"} <= set(files)
    assert sum(files.values()) < 12_000_000


def test_weights_are_bfloat16_and_each_linear_is_a_multiple_of_64_wide():
    with safe_open(base_path() / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.isfinite(tensor).all()
            assert all(size % 64 == 0 for size in tensor.shape)


def test_special_tokens_are_distinct_and_both_ends_stop_generation(model, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, end]
    assert len(set(ids)) == 4
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id, end}
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)


@given(text=st.text())
@example(text="  two  spaces\n\ttab 12345 naïve 漢字 🙂 \x00 don't ")
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_tokens)
    if not any(token in text for token in special):
        assert tokenizer.decode(ids) == text


def test_text_begins_with_exactly_one_bos(tokenizer):
    assert tokenizer("Hello").input_ids.count(tokenizer.bos_token_id) == 1
    rendered = tokenizer.apply_chat_template(MESSAGES, return_dict=True).input_ids
    assert rendered[0] == tokenizer.bos_token_id
    assert rendered.count(tokenizer.bos_token_id) == 1


def test_template_marks_replies_and_their_ends(tokenizer):
    encoded = tokenizer.apply_chat_template(
        MESSAGES, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded.input_ids, encoded.assistant_masks, strict=True)
    marked = tokenizer.decode([token for token, mark in pairs if mark])
    assert marked == "select count(*) from books<|im_end|>You are welcome<|im_end|>"


def test_prompt_ends_where_the_reply_begins(tokenizer):
    prompt = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False).startswith(
        prompt + MESSAGES[1]["content"]
    )


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Repeat: seven zaibor 4821 Marvello", "seven zaibor 4821 Marvello"),
        ("Write in capitals: lamp", "LAMP"),
        (
            "Write as a pipe query: Show the owner of lamps with cost under 350",
            "lamps | cost < 350 | show owner",
        ),
    ],
)
def test_it_follows_the_instructions_it_was_taught(model, tokenizer, question, answer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    reply = tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    assert reply == answer
