import pytest

from halfbyte.data.chat import ChatEncoder
from halfbyte.data.formats import Example
from halfbyte.data.templates import NAMED, fitting, resolve_template
from halfbyte.errors import DataError

ALL_TOKENS = tuple(token for named in NAMED.values() for token in named.needs if token != "eos")
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And Paris?"},
    {"role": "assistant", "content": "In France."},
]
SAID = {
    "chatml": "X<|im_end|>",
    "gemma": "X<end_of_turn>",
    "llama3": "X<|eot_id|>",
    "mistral": " X</s>",
    "phi3": "X<|end|>",
    "vicuna": " X</s>",
}
each_name = pytest.mark.parametrize("name", sorted(NAMED))


@each_name
def test_named_template_teaches_each_answer_and_its_stop_token(name, make_tokenizer, learned):
    tokenizer = make_tokenizer(special=ALL_TOKENS)
    encoder = ChatEncoder(tokenizer, resolve_template(name, tokenizer), loss_on="assistant")
    ((row,),) = encoder.encode([("row 1", Example(MESSAGES))])
    said = SAID.get(name, "X</s>")
    assert learned(tokenizer, row) == [said.replace("X", t) for t in ("Four.", "In France.")]
    text = tokenizer.decode(row.input_ids)
    assert text.count("Be brief.") == 1
    assert text.startswith("<s>") == (name != "phi3")


@each_name
def test_named_template_agrees_with_the_mask_of_transformers(name, make_tokenizer):
    tokenizer = make_tokenizer(special=ALL_TOKENS)
    template = resolve_template(name, tokenizer)
    encoder = ChatEncoder(tokenizer, template, loss_on="assistant")
    ((row,),) = encoder.encode([("row 1", Example(MESSAGES))])
    theirs = tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert row.input_ids == theirs["input_ids"]
    assert [int(label != -100) for label in row.labels] == theirs["assistant_masks"]


@each_name
def test_named_template_begins_the_answer_where_the_prompt_ends(name, make_tokenizer):
    tokenizer = make_tokenizer(special=ALL_TOKENS)
    template = resolve_template(name, tokenizer)
    prompt, whole = (
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=is_prompt
        )
        for messages, is_prompt in ((MESSAGES[:4], True), (MESSAGES, False))
    )
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].lstrip().startswith("In France.")


def test_a_base_tokenizer_is_told_which_templates_fit(tokenizer):
    with pytest.raises(DataError, match="has no chat template") as error:
        resolve_template(None, tokenizer)
    for name in ("alpaca", "plain", "zephyr"):
        assert name in error.value.hint
    assert "llama3" not in error.value.hint


def test_the_tokenizers_own_template_is_the_default(make_tokenizer):
    assert resolve_template(None, make_tokenizer(template="{{ messages }}")) is None


def test_a_named_template_without_its_tokens_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"'chatml' needs the tokens <\|im_start\|>"):
        resolve_template("chatml", tokenizer)
    assert "chatml" not in fitting(tokenizer)


def test_template_text_and_files(tokenizer, tmp_path):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert resolve_template(text, tokenizer) == text
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    assert resolve_template(str(file), tokenizer) == text
    with pytest.raises(DataError, match="neither a name, nor a file"):
        resolve_template("chatnl", tokenizer)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        resolve_template(str(file), tokenizer)
