import random
import re

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from halfbyte.data import words as module
from halfbyte.data.words import WholeText, WordEncoder, WordsDifferError, word_pattern

UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ANY = r"[^\r\n\p{L}\p{N}]?"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = (
    rf"{ENDINGS}|{ANY}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "qwen2": QWEN2,
    "qwen3.5": rf"{ENDINGS}|{ANY}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
    "gpt-oss": rf"{ANY}{UPPER}*{LOWER}+{ENDINGS}?|{ANY}{UPPER}+{LOWER}*{ENDINGS}?|\p{{N}}{{1,3}}|"
    + REST,
    "nemo": rf"{ANY}{UPPER}*{LOWER}+|{ANY}{UPPER}+{LOWER}*|\p{{N}}|{REST}",
}
SPECIAL = ["<|s|>", "<|e|>", "<t>"]
# What the expressions tell apart, above all at the edges of words.
ATOMS = [
    *("a", "b", "S", "t", "'s", "'LL", "n't", ".", ",", "!", "/", "_", "-", "1", "23", "\u0663"),
    *(" ", " ", " ", "  ", "\n", "\n", "\n\n", " \n", "\r\n", "\t", "\x0b", "\x1c", "\x1f", "\x85"),
    *("\u00a0", "\u2028", "\u3000", "\u200b", "\ufeff", "\u180e", "\x00", "\u0301", "\u0345"),
    *(".\n/", "\u00e9", "\u4e2d", "\U0001f600", "\ufb01", "\u2167", "\u00b2", "\u2026", *SPECIAL),
]


def texts(number):
    chance = random.Random(7)
    return ["".join(chance.choices(ATOMS, k=chance.randint(0, 30))) for _ in range(number)]


def split(expression, behavior="isolated"):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), behavior), byte_level])


def byte_level(**settings):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **settings})


PRE_TOKENIZERS = {
    "gpt2": byte_level(),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level()]
    ),
    **{name: split(expression) for name, expression in SPLITS.items()},
}


def make(pre_tokenizer, normalizer=None, added=SPECIAL):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.normalizer = pre_tokenizer, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts(400), trainer)
    core.add_tokens(added)
    return core


def whole_texts(core, batch):
    return [WholeText(it) for it in core.encode_batch(batch, add_special_tokens=False)]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["", "nfc"])
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_words_have_the_tokens_of_the_whole_text(name, normalizer):
    core = make(PRE_TOKENIZERS[name], normalizer)
    batch = texts(600)
    encoder = WordEncoder(core)
    for text, words, whole in zip(
        batch, encoder.encode_batch(batch), whole_texts(core, batch), strict=True
    ):
        assert words.ids == whole.ids, text
        for position in range(0, len(text) + 1, 7):
            assert words.token_at(position) == whole.token_at(position), (text, position)
    assert sum(len(words.words) for words in encoder.encode_batch(batch)) > 2 * len(batch)


@pytest.mark.parametrize(
    "core",
    [
        make(byte_level(add_prefix_space=True)),
        make(byte_level(use_regex=False)),
        make(split(r"\p{L}+|\p{N}+|\s+")),
        make(split(QWEN2 + r"|\p{L}+ \p{L}+")),
        make(split(QWEN2, "removed")),
        make(pre_tokenizers.Whitespace()),
        make(None),
        make(byte_level(), normalizers.NFKC()),
        make(byte_level(), normalizers.Prepend("x")),
        make(byte_level(), added=["two words"]),
        make(byte_level(), added=[AddedToken("<x>", rstrip=True)]),
        Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    ],
)
def test_other_tokenizers_get_whole_texts(core):
    assert word_pattern(core) is None
    batch = ["a b", "a"]
    assert [it.ids for it in WordEncoder(core).encode_batch(batch)] == [
        it.ids for it in whole_texts(core, batch)
    ]


def test_forgotten_words_are_learned_again(monkeypatch):
    monkeypatch.setattr(module, "MAX_WORDS", 3)
    core = make(byte_level())
    encoder = WordEncoder(core)
    for batch in (["a b", "b a b"], ["a b c d e f"], ["b"]):  # the second alone is more
        assert [it.ids for it in encoder.encode_batch(batch)] == [
            it.ids for it in whole_texts(core, batch)
        ]
    assert set(encoder._numbers) == {"b"}


def test_a_text_in_every_batch_is_compared(monkeypatch):
    monkeypatch.setattr(module, "word_pattern", lambda _: re.compile(r"\s|\S"))
    encoder = WordEncoder(make(byte_level()))
    with pytest.raises(WordsDifferError):
        encoder.encode_batch(["a.a.a.a.a.a. a a a a 'LL'LL'LL"])
    encoder.by_whole_texts()
    assert encoder.encode_batch(["a 'LL"])
