"""A tokenizer's metadata say what llama.cpp must do."""

import gguf
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.errors import CheckpointError, DataError
from halfbyte.gguf.vocabulary import make_vocabulary, model_name, served_template


def test_byte_level_tokens_merges_and_types(make_byte_level):
    tokenizer = make_byte_level()
    found = make_vocabulary(tokenizer, 270)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert len(found.tokens) == len(found.types) == 270
    assert found.tokens[258] == "<|im_end|>"
    assert found.types[258] == gguf.TokenType.CONTROL
    assert found.types[0] == gguf.TokenType.NORMAL
    assert found.types[269] == gguf.TokenType.UNUSED
    assert found.merges[:3] == ["t h", "th e", "Ġ the"]


def test_special_tokens_and_stops(make_byte_level):
    tokenizer = make_byte_level()
    assert make_vocabulary(tokenizer, 270).special == {
        "bos": 258,  # there is none, and llama.cpp would take token 11 for it
        "eos": 258,
        "eot": 258,
        "pad": 256,
    }
    tokenizer.eos_token = "<|endoftext|>"
    found = make_vocabulary(tokenizer, 270, config_bos=257).special
    assert (found["bos"], found["eos"], found["eot"]) == (257, 256, 258)


def test_bos_is_added_where_training_had_it(make_byte_level):
    tokenizer = make_byte_level()
    assert not make_vocabulary(tokenizer, 270).add_bos
    tokenizer.bos_token = "<|endoftext|>"
    assert not make_vocabulary(tokenizer, 270).add_bos
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert make_vocabulary(tokenizer, 270).add_bos


def test_a_template_that_never_ends_is_stopped(make_byte_level):
    tokenizer = make_byte_level()
    tokenizer.chat_template = "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"
    with pytest.raises(DataError, match="was stopped"):
        make_vocabulary(tokenizer, 270)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_scores_follow_the_merges(prefix, make_sentencepiece):
    found = make_vocabulary(make_sentencepiece(prefix=prefix), 400)
    assert (found.model, found.add_space_prefix) == ("llama", prefix)
    assert found.tokens[0] == "<unk>"
    assert found.types[0] == gguf.TokenType.UNKNOWN
    assert found.types[found.tokens.index("<0x41>")] == gguf.TokenType.BYTE
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["▁t"] > score["▁the"]  # made of the other, so it is joined earlier
    assert not found.merges
    assert found.add_bos


def test_generation_tags_go_and_their_whitespace_control_stays(make_byte_level):
    tokenizer = make_byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %} {%- generation -%} {{ m.content }} {%- endgeneration %} ."
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "x"}]
    served = served_template(tokenizer)
    assert "generation" not in served
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, chat_template=served, tokenize=False) == expected
    tokenizer.chat_template = None
    assert served_template(tokenizer) is None


def test_phi3s_name_follows_its_tokens(make_byte_level):
    tokenizer = make_byte_level()
    assert model_name("my-Phi-3-run", tokenizer).lower().count("phi-3") == 0
    stripping = tokenizers.AddedToken("<|user|>", special=True, rstrip=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [stripping]})
    assert "phi-3" in model_name("run", tokenizer)


def test_what_llama_cpp_cannot_do_is_refused(make_byte_level, make_sentencepiece):
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)], 0))
    with pytest.raises(CheckpointError, match="of the kind Unigram"):
        make_vocabulary(PreTrainedTokenizerFast(tokenizer_object=unigram), 10)
    with pytest.raises(CheckpointError, match="model has 200 rows"):
        make_vocabulary(make_byte_level(), 200)
    odd = make_byte_level()
    odd.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(CheckpointError, match="normalizes text with Lowercase"):
        make_vocabulary(odd, 270)
    odd = make_sentencepiece(prefix=False)
    odd.backend_tokenizer.normalizer = tokenizers.normalizers.NFKC()
    with pytest.raises(CheckpointError, match="changes text by NFKC"):
        make_vocabulary(odd, 400)
