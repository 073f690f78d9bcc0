import json

import pytest
import tokenizers
import transformers

from halfbyte.errors import CheckpointError
from halfbyte.models.tokenizer import load_tokenizer


@pytest.fixture
def make(tmp_path):
    """Return a function that saves a tokenizer of ten words and these special tokens."""

    def save(*special, **settings):
        vocabulary = {f"w{i}": i for i in range(10)}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
        backend.add_special_tokens(list(special))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return save


def test_its_own_padding_stays(make):
    folder = make("</s>", "<|reserved_0|>", "<fill>", eos_token="</s>", pad_token="<fill>")
    assert load_tokenizer(folder, 20).pad_token == "<fill>"


def test_padding_that_is_the_stop_token_stays_too(make):
    folder = make("</s>", "<|reserved_0|>", eos_token="</s>", pad_token="</s>")
    assert load_tokenizer(folder, 20).pad_token == "</s>"


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"), 0),
        (("<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"), 1),
        (("<unused7>", "[PAD]"), 1),
        (("<tool>", "<unused7>"), 1),
    ],
)
def test_a_reserved_token_is_taken(make, special, expected):
    folder = make("</s>", *special, eos_token="</s>")
    assert load_tokenizer(folder, 20).pad_token == special[expected]


def test_the_stop_token_pads_where_nothing_is_reserved(make):
    folder = make("</s>", "<tool>", eos_token="</s>")
    tokenizer = load_tokenizer(folder, 20)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_reserved_token_without_an_embedding_is_not_taken(make):
    folder = make("</s>", "<|reserved_0|>", eos_token="</s>")
    assert load_tokenizer(folder, 11).pad_token == "</s>"


def test_case_41_a_stop_token_without_an_embedding(make):
    with pytest.raises(CheckpointError, match="eos_token"):
        load_tokenizer(make("</s>", eos_token="</s>"), 10)


@pytest.mark.parametrize("text", ["", "{", json.dumps({"model": {"type": "Nothing"}})])
def test_case_42_a_damaged_file(make, text):
    folder = make("</s>", eos_token="</s>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(folder, 20)
