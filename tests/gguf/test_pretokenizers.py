"""Patterns of tokenizer.json become names that llama.cpp knows."""

import json

import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from halfbyte.errors import CheckpointError
from halfbyte.gguf.pretokenizers import PRE_TOKENIZERS, find_pre_tokenizer, pre_tokenizer_named

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def backend(pre_tokenizer, **settings):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [], **settings))
    tokenizer.pre_tokenizer = pre_tokenizer
    return json.loads(tokenizer.to_str())


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), PLAIN])


@pytest.mark.parametrize(
    ("pre_tokenizer", "settings", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {}, "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
            {},
            "smollm",
        ),
        (split(LLAMA3), {"ignore_merges": True}, "llama-bpe"),
        (split(LLAMA3), {}, "smaug-bpe"),
        (split(QWEN2), {}, "qwen2"),
    ],
)
def test_known_ones_are_found(pre_tokenizer, settings, name):
    assert find_pre_tokenizer(backend(pre_tokenizer, **settings)).name == name


@pytest.mark.parametrize(
    ("pre_tokenizer", "settings"),
    [
        (split(r"\w+"), {}),
        (split(QWEN2), {"ignore_merges": True}),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
        (pre_tokenizers.Whitespace(), {}),
        (PLAIN, {}),
    ],
)
def test_others_are_refused(pre_tokenizer, settings):
    with pytest.raises(CheckpointError, match=r"llama\.cpp is not known to do") as caught:
        find_pre_tokenizer(backend(pre_tokenizer, **settings))
    assert "smollm" in caught.value.hint


TEXT = (
    "Hello, WORLD's HTTPServer I'LL 'tis 12345 x=1;\n\n\n\t \r\n  indented   end  "
    "Größe ÉCOLE 北京天安门 नमस्ते 🙂👍🏽 … ¿qué? a\u00a0b ١٢٣"
)


@pytest.mark.parametrize("found", PRE_TOKENIZERS, ids=lambda found: found.name)
def test_llama_cpps_patterns_cut_as_the_original_ones(found):
    """Tekken and GPT-4o are approximated by llama.cpp for letters without case or with marks."""
    text = TEXT
    if found.name in ("tekken", "gpt-4o"):
        text = "Hello, WORLD's HTTPServer 12345 x=1;\n\n\n\t \r\n  indented   end  ¿que? 🙂"
    steps = {
        "digits": pre_tokenizers.Digits(individual_digits=True),
        "byte level": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    original = [
        steps.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in found.steps
    ]
    served = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in found.patterns]
    cuts = [
        [span for _, span in pre_tokenizers.Sequence([*parts, PLAIN]).pre_tokenize_str(text)]
        for parts in (original, served)
    ]
    assert cuts[0] == cuts[1]


def test_names_are_looked_up():
    assert pre_tokenizer_named("qwen2").patterns
    assert pre_tokenizer_named("default") is None
