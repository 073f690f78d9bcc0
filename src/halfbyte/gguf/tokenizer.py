"""A GGUF file's tokenizer, read back and run by llama.cpp's rules.

This is what a server makes of text: special tokens are cut out first, the rest is tokenized by the
vocabulary, the merges or scores, and the pre-tokenizer that the file names. It is written from
llama-vocab.cpp, not from the tokenizer that the file was made of, so that comparing the two says
something; the tests compare it with llama.cpp itself.
"""

import heapq
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from halfbyte.data.sandbox import render_conversation
from halfbyte.errors import CheckpointError
from halfbyte.gguf.pretokenizers import pre_tokenizer_named
from halfbyte.gguf.vocabulary import SPACE, STRIPPING_NAMES

_SPECIAL = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNKNOWN)
_NOT_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")


class GgufTokenizer:
    """Text to token ids as llama.cpp does it, from a file's metadata.

    Args:
        path: A GGUF file.

    Raises:
        CheckpointError: it has no tokenizer of a kind known here.
    """

    def __init__(self, path: str | Path) -> None:
        self._fields = gguf.GGUFReader(path).fields
        self.tokens: list[str] = self._read("tokenizer.ggml.tokens", [])
        self.model = self._read("tokenizer.ggml.model", None)
        self.pre = pre_tokenizer_named(self._read("tokenizer.ggml.pre", "default"))
        self.template: str = self._read("tokenizer.chat_template", "")
        self.adds_bos = bool(self._read("tokenizer.ggml.add_bos_token", False))  # noqa: FBT003
        self.bos_id = self._read("tokenizer.ggml.bos_token_id", None)
        self.eos_id = self._read("tokenizer.ggml.eos_token_id", None)
        eot = self._read("tokenizer.ggml.eot_token_id", None)
        self.stop_ids = {index for index in (self.eos_id, eot) if index is not None}
        if not self.tokens or self.model not in ("gpt2", "llama"):
            raise CheckpointError(f"{path} has no tokenizer of the kinds gpt2 and llama")
        if self.model == "gpt2" and self.pre is None:
            raise CheckpointError(f"{path} names a pre-tokenizer that is not known here")

    def prompt_ids(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> list[int]:
        """Return what a server asks the model, for messages and the beginning of an answer.

        Raises:
            DataError: the template refuses the messages, or breaks a limit of time or size.
        """
        variables = {
            "messages": list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
            "bos_token": self._text(self.bos_id),
            "eos_token": self._text(self.eos_id),
        }
        text = render_conversation(self.template, variables)
        if self.adds_bos:  # the server adds it, and takes the template's away
            text = text.removeprefix(self._text(self.bos_id))
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, its special tokens read as such, after BOS if it is added."""
        ids = [self.bos_id] if self.adds_bos else []
        follows_special = True
        for piece, special in self._partition(text):
            if special is not None:
                ids.append(special)
            elif self.model == "gpt2":
                ids += self._byte_level.encode(piece, add_special_tokens=False).ids
            else:
                prefix = " " if self._adds_space and follows_special else ""
                ids += self._joined((prefix + piece).replace(" ", SPACE))
            follows_special = special is not None
        return ids

    def spell(self, ids: Sequence[int]) -> str:
        """Return tokens as text that can be read, a bar between two."""
        return "|".join(self.tokens[index].replace("\u0120", " ") for index in ids)

    def _read(self, key: str, default: Any) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def _text(self, index: int | None) -> str:
        return "" if index is None else self.tokens[index]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def _adds_space(self) -> bool:
        return bool(self._read("tokenizer.ggml.add_space_prefix", True))  # noqa: FBT003

    @cached_property
    def _special(self) -> list[str]:
        """Texts of the tokens that are cut out of text, the longest first."""
        types = self._read("tokenizer.ggml.token_type", [])
        found = [token for token, kind in zip(self.tokens, types, strict=True) if kind in _SPECIAL]
        return sorted(found, key=lambda token: -len(token.encode()))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(f"({re.escape(token)})" for token in self._special) or "(?!)")

    @cached_property
    def _strips(self) -> bool:
        name = str(self._read("general.name", "")).lower()
        return any(part in name for part in STRIPPING_NAMES)

    def _partition(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield (text, None) and (token, id), in order."""
        start = 0
        for match in self._special_pattern.finditer(text):
            if match.start() > start:
                yield text[start : match.start()], None
            yield match.group(), self._ids[match.group()]
            start = match.end()
            if self._strips and match.group() not in _NOT_STRIPPED:
                start = len(text) - len(text[start:].lstrip())
        if start < len(text):
            yield text[start:], None

    @cached_property
    def _byte_level(self) -> Tokenizer:
        """Byte-level BPE with the patterns that llama.cpp has under the name in the file."""
        assert self.pre is not None
        merges = [tuple(merge.split(" ")) for merge in self._read("tokenizer.ggml.merges", [])]
        core = Tokenizer(models.BPE(self._ids, merges, ignore_merges=self.pre.ignore_merges))
        cuts = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in self.pre.patterns
        ]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
        return core

    def _joined(self, text: str) -> list[int]:
        """Join neighbours, the best score first and the leftmost of equals (llm_tokenizer_spm)."""
        scores = self._scores
        parts: list[str | None] = list(text)
        after = [*range(1, len(parts)), -1]
        before = list(range(-1, len(parts) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            pair = f"{parts[left]}{parts[right]}"
            if pair in self._ids:
                heapq.heappush(queue, (-scores[self._ids[pair]], left, right, pair))

        for left, right in itertools.pairwise(range(len(parts))):
            offer(left, right)
        while queue:
            _, left, right, pair = heapq.heappop(queue)
            if (
                parts[left] is None
                or parts[right] is None
                or f"{parts[left]}{parts[right]}" != pair
            ):
                continue
            parts[left], parts[right] = pair, None
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [index for part in parts if part is not None for index in self._of_part(part)]

    @cached_property
    def _scores(self) -> list[float]:
        return list(self._read("tokenizer.ggml.scores", []))

    def _of_part(self, part: str) -> list[int]:
        """Return the token of a part, or those of its bytes."""
        if part in self._ids:
            return [self._ids[part]]
        return [self._ids[f"<0x{byte:02X}>"] for byte in part.encode()]
