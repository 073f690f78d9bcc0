"""Text to tokens word by word, each word only once.

Most byte-level tokenizers cut a text into pieces by a regular expression before their merges see
it, so a word has the same tokens wherever it stands, and a dictionary of words is several times
faster than tokenizing each text whole. What is called a word here is what lies between two places
where such an expression always cuts: a few letters with the space before them, mostly.

Where it always cuts follows from the expression. None of the alternatives in `_SAFE` holds a
character followed by a space, or looks at what follows anything but whitespace. So none reaches
across the place between a character and a space, or depends on what is behind it, and the next
match begins there. The same holds behind line ends that stand between two characters.

Tokenizers that are not known to be of this kind get every text whole. For the others one text in
every batch is tokenized both ways all the same.
"""

import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from tokenizers import Encoding, Tokenizer

# A memo of so many words takes about 60 MB.
MAX_WORDS = 1 << 18

# Of ByteLevel's own expression: words end before ASCII whitespace, or behind one line end.
_BYTE_LEVEL_WORD = re.compile(r"\s*\S+(?:[^\S\t-\r ]\s*\S*)*(?:\n(?=\S))?|\s+")
# Of the expressions made of `_SAFE`: words end before a space, or behind line ends.
_SPLIT_WORD = re.compile(r"\s*\S+(?:(?![\r\n]+[^\s/])[^\S ]\s*\S*)*(?:[\r\n]+(?=[^\s/]))?|\s+")
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = [
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
]
# Whitespace, without which spaces would not begin a match.
_SPACES = frozenset({r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"})
# The alternatives of the families' expressions: Llama 3 and 4, Qwen 2 to 3.5, GPT-4 and gpt-oss,
# OLMo 2, SmolLM 3, Mistral NeMo.
_SAFE = _SPACES | {
    _ENDINGS,
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    *_CASES,
    *(f"{case}{_ENDINGS}?" for case in _CASES),
    r"\p{N}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
}
_BETWEEN_ALTERNATIVES = re.compile(r"\|(?![^(]*\))")


class WordsDifferError(Exception):
    """A text has other tokens word by word than whole."""


class Tokens(Protocol):
    """The tokens of one text."""

    @property
    def ids(self) -> list[int]:
        """Token ids."""

    def token_at(self, position: int) -> int | None:
        """Return the token that begins at this character, or `None` if none does."""


@dataclass(frozen=True)
class WholeText:
    """The tokens of a text that was tokenized whole."""

    encoding: Encoding

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        return self.encoding.ids

    def token_at(self, position: int) -> int | None:
        """Return the token that begins at this character, or `None` if none does."""
        token = self.encoding.char_to_token(position)
        if token is None:
            return None
        characters = self.encoding.token_to_chars(token)
        return token if characters is not None and characters[0] == position else None


@dataclass(frozen=True)
class Words:
    """The tokens of a text that was tokenized word by word.

    Args:
        words: The text, cut.
        parts: The ids of each word.
        core: What tokenized them.
    """

    words: list[str]
    parts: list[list[int]]
    core: Tokenizer

    @cached_property
    def ids(self) -> list[int]:
        """Token ids."""
        return list(itertools.chain.from_iterable(self.parts))

    def token_at(self, position: int) -> int | None:
        """Return the token that begins at this character, or `None` if none does."""
        ends = self._ends
        word = bisect_right(ends, position)
        if word == len(ends):
            return None
        inside = position - (ends[word - 1] if word else 0)
        before = sum(map(len, self.parts[:word]))
        if not inside:
            return before
        whole = WholeText(self.core.encode(self.words[word], add_special_tokens=False))
        token = whole.token_at(inside)
        return None if token is None else before + token

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.words)))


class WordEncoder:
    """Tokenizes texts, word by word where that is the same.

    Args:
        core: A tokenizer without truncation, padding and post-processor.
    """

    def __init__(self, core: Tokenizer) -> None:
        self._core = core
        self._pattern = word_pattern(core)
        self._memo: dict[str, list[int]] = {}

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Tokens]:
        """Return the tokens of each text.

        Raises:
            WordsDifferError: those of the first are others than the core's.
        """
        if self._pattern is None:
            return [
                WholeText(it) for it in self._core.encode_batch(texts, add_special_tokens=False)
            ]
        cut = [self._pattern.findall(text) for text in texts]
        self._learn(set(itertools.chain.from_iterable(cut)))
        found = [Words(words, [self._memo[word] for word in words], self._core) for words in cut]
        if found and found[0].ids != self._core.encode(texts[0], add_special_tokens=False).ids:
            raise WordsDifferError
        return found

    def by_whole_texts(self) -> None:
        """Tokenize whole texts from now on."""
        self._pattern = None

    def _learn(self, words: set[str]) -> None:
        new = list(words.difference(self._memo))
        if len(self._memo) + len(new) > MAX_WORDS:
            self._memo.clear()
            new = list(words)
        encoded = self._core.encode_batch_fast(new, add_special_tokens=False)
        self._memo.update(zip(new, (it.ids for it in encoded), strict=True))


def word_pattern(core: Tokenizer) -> re.Pattern[str] | None:
    """Return what finds a tokenizer's words in a text; `None` if only whole texts are safe."""
    parts: dict[str, Any] = json.loads(core.to_str())
    model, normalizer = parts["model"], parts["normalizer"]
    if model["type"] != "BPE" or model["dropout"]:
        return None
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    for token in parts["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return None
        if any(character.isspace() for character in token["content"]):
            return None
    return _pattern_of(parts["pre_tokenizer"])


def _pattern_of(pre_tokenizer: dict[str, Any] | None) -> re.Pattern[str] | None:
    step = pre_tokenizer or {"type": None}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    *first, last = [it for it in steps if it["type"] != "Digits"] or [step]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not first:
        return _BYTE_LEVEL_WORD if last["use_regex"] else None
    is_split = len(first) == 1 and first[0]["type"] == "Split" and not last["use_regex"]
    return _SPLIT_WORD if is_split and _is_safe(first[0]) else None


def _is_safe(split: dict[str, Any]) -> bool:
    alternatives = set(_BETWEEN_ALTERNATIVES.split(split["pattern"].get("Regex", "")))
    is_plain = split["behavior"] == "Isolated" and not split["invert"]
    return is_plain and _SPACES <= alternatives <= _SAFE
