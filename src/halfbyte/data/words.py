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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

IntArray = NDArray[np.int64]
TokenArray = NDArray[np.int32]

# So many words take about 40 MB.
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
# The alternatives of the families' expressions: Llama 3, Qwen 2 to 3.5, gpt-oss, Mistral NeMo.
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
        ids: Token ids.
        words: The text, cut.
        ends: int64 [W], the character behind each word.
        firsts: int64 [W], the first token of each word.
        core: What tokenized them.
    """

    ids: list[int]
    words: list[str]
    ends: IntArray
    firsts: IntArray
    core: Tokenizer

    def token_at(self, position: int) -> int | None:
        """Return the token that begins at this character, or `None` if none does."""
        word = int(self.ends.searchsorted(position, side="right"))
        if word == len(self.words):
            return None
        first = int(self.firsts[word])
        inside = position - int(self.ends[word]) + len(self.words[word])
        if not inside:
            return first
        whole = WholeText(self.core.encode(self.words[word], add_special_tokens=False))
        token = whole.token_at(inside)
        return None if token is None else first + token


class WordEncoder:
    """Tokenizes texts, word by word where that is the same.

    Args:
        core: A tokenizer without truncation, padding and post-processor.
    """

    def __init__(self, core: Tokenizer) -> None:
        self._core = core
        self._pattern = word_pattern(core)
        self._forget()

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Tokens]:
        """Return the tokens of each text.

        Raises:
            WordsDifferError: those of the first are others than the core's.
        """
        if self._pattern is None:
            return [
                WholeText(it) for it in self._core.encode_batch(texts, add_special_tokens=False)
            ]
        found = self._by_words([self._pattern.findall(text) for text in texts])
        if found and found[0].ids != self._core.encode(texts[0], add_special_tokens=False).ids:
            raise WordsDifferError
        return found

    def by_whole_texts(self) -> None:
        """Tokenize whole texts from now on."""
        self._pattern = None

    def _by_words(self, cut: list[list[str]]) -> list[Words]:
        """Return the tokens of texts that are cut into words, all texts in a few array steps."""
        words = list(itertools.chain.from_iterable(cut))
        numbers = self._look_up(words)
        starts = self._edges[numbers]
        counts = self._edges[numbers + 1] - starts
        firsts = np.concatenate([[0], np.cumsum(counts)])
        ids = self._ids[np.arange(firsts[-1]) + np.repeat(starts - firsts[:-1], counts)]
        ends = np.cumsum(np.fromiter(map(len, words), dtype=np.int64, count=len(words)))
        found = []
        a = character = 0
        for part in cut:
            b = a + len(part)
            tokens = ids[firsts[a] : firsts[b]].tolist()
            found.append(
                Words(tokens, part, ends[a:b] - character, firsts[a:b] - firsts[a], self._core)
            )
            a, character = b, int(ends[b - 1]) if b else 0
        return found

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}
        # Word n has the tokens _ids[_edges[n] : _edges[n + 1]].
        self._ids: TokenArray = np.empty(0, dtype=np.int32)
        self._edges: IntArray = np.zeros(1, dtype=np.int64)

    def _look_up(self, words: list[str]) -> IntArray:
        """Return the number of each word, after new ones have been tokenized."""
        distinct = set(words)  # looked up once: in so large a dictionary that is a cache miss
        new = distinct.difference(self._numbers)
        if len(self._numbers) + len(new) > MAX_WORDS:
            self._forget()
            new = distinct
        self._learn(list(new))
        numbers = {word: self._numbers[word] for word in distinct}
        return np.fromiter(map(numbers.__getitem__, words), dtype=np.int64, count=len(words))

    def _learn(self, words: list[str]) -> None:
        encoded = self._core.encode_batch_fast(words, add_special_tokens=False)
        found = [it.ids for it in encoded]
        self._numbers.update(zip(words, itertools.count(len(self._numbers))))
        ends = self._edges[-1] + np.cumsum([len(ids) for ids in found], dtype=np.int64)
        self._edges = np.concatenate([self._edges, ends])
        new = np.fromiter(itertools.chain.from_iterable(found), dtype=np.int32)
        self._ids = np.concatenate([self._ids, new])


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
