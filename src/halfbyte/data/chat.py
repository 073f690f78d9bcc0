"""Rendered conversations to token ids and the labels to learn.

The text is tokenized as it stands, without `add_special_tokens`: the template writes the BOS, as
it does when the model is served. Labels follow from character offsets: a token is learned if all
its characters are in a learned span. Two things make a row take the slower path, where pieces of
its text are tokenized one by one:

- a token that straddles the edge of a span: there the text is cut, so that the prompt has the
  very tokens that it has when the model is asked to go on;
- text in a message that spells a special token: it stays text, as nobody but the template may
  write the real one. It is hidden behind a private character while the template runs.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from halfbyte.data.content import LOOKS_SPECIAL
from halfbyte.data.formats import Example, Message
from halfbyte.data.notes import Note
from halfbyte.data.spans import PRIVATE, Rendered, Renderer, Span, added_tokens
from halfbyte.data.words import Tokens, WholeText, WordEncoder
from halfbyte.errors import DataError

IGNORE_INDEX = -100
# The first three noncharacters belong to the renderer.
_SHIELDS = [chr(code) for code in range(0xFDD3, 0xFDF0)]


@dataclass(frozen=True)
class Encoded:
    """One row of tokens.

    Args:
        input_ids: Token ids.
        labels: The same ids where they are learned, else -100; not shifted. The first is always
            -100, as nothing predicts it.
        notes: What was remarkable.
    """

    input_ids: list[int]
    labels: list[int]
    notes: Note = Note.NONE


class ChatEncoder:
    """Turns examples into tokens and labels.

    Args:
        tokenizer: A fast tokenizer.
        template: Jinja text; `None` for the tokenizer's own.
        loss_on: "assistant", "completion" or "all".

    Attributes:
        special: The texts of the tokenizer's special tokens.
        known: The texts of all tokens that were added to its vocabulary.

    Raises:
        DataError: the tokenizer is not a fast one, so it cannot say which characters a token is.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None, *, loss_on: str
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} has no character offsets, which exact masks need",
                hint="use a model with a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, template, loss_on=loss_on)
        special = added_tokens(tokenizer, special=True)
        self.special = frozenset(special)
        self.known = frozenset(added_tokens(tokenizer, special=False))
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @property
    def frame_tokens(self) -> list[str]:
        """What the template writes around messages that looks like tokens, and is none."""
        said = [{"role": role, "content": "x"} for role in ("user", "assistant")]
        try:
            text = self.renderer.render(said, prompt=True)
        except DataError:
            return []
        return sorted(set(LOOKS_SPECIAL.findall(text)) - self.known)

    def encode(self, examples: Sequence[tuple[str, Example]]) -> list[list[Encoded]]:
        """Return the rows of each example; `examples` pairs each with where it came from.

        Raises:
            DataError: an example cannot be encoded exactly; the message names where it came from.
        """
        encoded = self.encode_each(examples)
        for rows in encoded:
            if isinstance(rows, DataError):
                raise rows
        return [rows for rows in encoded if not isinstance(rows, DataError)]

    def encode_each(
        self, examples: Sequence[tuple[str, Example]]
    ) -> list[list[Encoded] | DataError]:
        """Return the rows of each example, or why it cannot be encoded exactly."""
        rendered = [_attempt(where, self._render, example) for where, example in examples]
        flat = [row for rows in rendered if isinstance(rows, list) for row in rows]
        tokens = iter(self.words.encode_batch([row.rendered.text for row in flat]))
        return [
            rows
            if isinstance(rows, DataError)
            else _attempt(where, self._finish_all, rows, list(itertools.islice(tokens, len(rows))))
            for (where, _), rows in zip(examples, rendered, strict=True)
        ]

    def _finish_all(self, rows: "list[_Row]", tokens: list[Tokens]) -> list[Encoded]:
        return [self._finish(row, it) for row, it in zip(rows, tokens, strict=True)]

    @cached_property
    def words(self) -> WordEncoder:
        """What tokenizes texts."""
        return WordEncoder(self._parser)

    @cached_property
    def _parser(self) -> Tokenizer:
        """The tokenizer's core, without its post-processor, which would trim offsets."""
        core = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        core.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        core.no_truncation()
        core.no_padding()
        return core

    @cached_property
    def _speller(self) -> Tokenizer:
        """The same core, which reads special tokens as the text that spells them."""
        core = Tokenizer.from_str(self._parser.to_str())
        core.encode_special_tokens = True
        return core

    def _render(self, example: Example) -> list["_Row"]:
        if example.text is not None:
            _check_unicode(example.text)
            whole = ((0, len(example.text)),)
            return [_Row(Rendered(example.text, whole), {}, is_document=True)]
        hidden, shields = self._hide(example.messages)
        rows = self.renderer.rows(hidden, example.tools)
        notes = Note.NONE
        if shields:
            plain = self.renderer.rows(example.messages, example.tools)
            if [row.text for row in plain] == [_spell(row.text, shields) for row in rows]:
                notes |= Note.SPECIAL_TEXT
            else:  # the template itself reads that text
                rows, shields, notes = plain, {}, notes | Note.SPECIAL_TOKEN
        if len(rows) > 1:
            notes |= Note.REWRITTEN
        for row in rows:
            _check_unicode(row.text)
        return [_Row(row, shields, notes=notes) for row in rows]

    def _hide(self, messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
        """Return the messages with private characters for special tokens' text, and which."""
        shields: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            return shields.setdefault(match.group(), _SHIELDS[len(shields) % len(_SHIELDS)])

        hidden = [
            {
                name: value if name == "role" else self._without_special(value, hide)
                for name, value in message.items()
            }
            for message in messages
        ]
        if not shields or len(shields) > len(_SHIELDS):
            return messages, {}
        return hidden, {shield: text for text, shield in shields.items()}

    def _without_special(self, value: Any, hide: Callable[[re.Match[str]], str]) -> Any:
        """Return a value of a message with the special tokens in its texts replaced."""
        if isinstance(value, str):
            return self._special.sub(hide, value)
        if isinstance(value, list):
            return [self._without_special(item, hide) for item in value]
        if isinstance(value, dict):
            return {name: self._without_special(item, hide) for name, item in value.items()}
        return value

    def _finish(self, row: "_Row", tokens: Tokens) -> Encoded:
        if row.is_document:
            return self._document(tokens.ids, row)
        ids, ranges, notes = self._tokens(row, tokens)
        labels = [IGNORE_INDEX] * len(ids)
        for start, end in ranges:
            labels[start:end] = ids[start:end]
        if row.rendered.needs_eos:
            eos = self._eos()
            ids, labels, notes = [*ids, eos], [*labels, eos], notes | Note.EOS_APPENDED
        labels[:1] = [IGNORE_INDEX]
        return Encoded(ids, labels, notes)

    def _tokens(self, row: "_Row", tokens: Tokens) -> tuple[list[int], list[Span], Note]:
        """Return ids, the ranges of them that are learned, and notes."""
        ranges = None if row.shields else _token_ranges(tokens, row.rendered)
        if ranges is not None:
            return tokens.ids, ranges, row.notes
        ids, ranges = self._pieces(row)
        text = _spell(row.rendered.text, row.shields)
        whole = self._parser.encode(text, add_special_tokens=False)
        if self._decode(ids) == self._decode(whole.ids):
            return ids, ranges, row.notes
        if row.shields:  # this tokenizer changes text that it gets in pieces
            notes = row.notes & ~Note.SPECIAL_TEXT | Note.SPECIAL_TOKEN
            return self._tokens(_Row(_spelled(row), {}, notes=notes), WholeText(whole))
        raise DataError(
            "this tokenizer joins the end of the prompt and the beginning of the answer in one "
            "token, so the mask cannot be exact",
            hint="end the template's generation prompt without a space",
        )

    def _pieces(self, row: "_Row") -> tuple[list[int], list[Span]]:
        """Tokenize the text cut at every span's edges, spelling out what is behind shields."""
        text, spans = row.rendered.text, row.rendered.spans
        cuts = {0, len(text), *itertools.chain.from_iterable(spans)}
        for match in PRIVATE.finditer(text):
            cuts.update(match.span() if match.group() in row.shields else ())
        ids: list[int] = []
        ranges: list[Span] = []
        for start, end in itertools.pairwise(sorted(cuts)):
            hidden = row.shields.get(text[start:end])
            core = self._parser if hidden is None else self._speller
            piece = core.encode(hidden or text[start:end], add_special_tokens=False).ids
            if any(a <= start and end <= b for a, b in spans):
                ranges.append((len(ids), len(ids) + len(piece)))
            ids += piece
        return ids, ranges

    def _decode(self, ids: list[int]) -> str:
        return str(self._parser.decode(ids, skip_special_tokens=False))

    def _document(self, ids: list[int], row: "_Row") -> Encoded:
        """Return BOS + text + EOS, all learned; what the text already has is not doubled."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        notes = row.notes if eos is not None else row.notes | Note.NO_STOP
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return Encoded(ids, [IGNORE_INDEX, *ids[1:]][: len(ids)], notes)

    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "the chat template puts no stop token after the answer, and the tokenizer has no "
                "EOS token to put there: the model would never learn to stop",
                hint="set the tokenizer's eos_token, or choose another chat_template",
            )
        return int(eos)


@dataclass(frozen=True)
class _Row:
    """A rendered row; `shields` maps private characters in its text to what they stand for."""

    rendered: Rendered
    shields: dict[str, str]
    is_document: bool = False
    notes: Note = Note.NONE


def _attempt(where: str, function: Any, *args: Any) -> Any:
    """Call `function` and return what it returns, or the error that it raised with `where`."""
    try:
        return function(*args)
    except DataError as error:
        return DataError(f"{where}: {error.message}", hint=error.hint)


def _token_ranges(tokens: Tokens, rendered: Rendered) -> list[Span] | None:
    """Return the tokens of each span, or `None` if one straddles an edge."""
    ranges = []
    for start, end in rendered.spans:
        if start == end:
            continue
        first = tokens.token_at(start)
        last = len(tokens.ids) if end == len(rendered.text) else tokens.token_at(end)
        if first is None or last is None:
            return None
        ranges.append((first, last))
    return ranges


def _spell(text: str, shields: dict[str, str]) -> str:
    """Return `text` with what is behind its shields."""
    return PRIVATE.sub(lambda m: shields.get(m.group(), m.group()), text) if shields else text


def _spelled(row: "_Row") -> Rendered:
    """Return the rendered row with what is behind its shields, its spans moved along."""
    text = row.rendered.text
    spans = tuple(
        (len(_spell(text[:a], row.shields)), len(_spell(text[:b], row.shields)))
        for a, b in row.rendered.spans
    )
    return Rendered(_spell(text, row.shields), spans, row.rendered.needs_eos)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a character (a lone surrogate, U+{ord(text[error.start]):04X})",
            hint="mend the row; it was cut in the middle of an emoji, most likely",
        ) from error
