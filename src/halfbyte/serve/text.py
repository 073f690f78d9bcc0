"""From tokens to text that may be sent, piece by piece.

Two things are held back: bytes that are not a whole character yet, and text that may be the
beginning of a stop string. What a stop string ends is cut before it, however its letters fall on
tokens; the stop string itself and what follows are never given out.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from halfbyte.serve.choose import TokenChoice

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """Text that may be sent, and the tokens that it is from, where they were asked for."""

    text: str = ""
    choices: tuple[TokenChoice, ...] = ()


@dataclass
class TextStream:
    """The text of one answer while it grows.

    Args:
        tokenizer: Turns tokens into text; special tokens have none.
        stop: Strings that end the answer.
    """

    tokenizer: PreTrainedTokenizerBase
    stop: Sequence[str] = ()
    is_stopped: bool = field(default=False, init=False)
    """Whether a stop string came."""
    _ids: list[int] = field(default_factory=list, init=False)
    _start: int = field(default=0, init=False)  # of the tokens that are decoded together
    _read: int = field(default=0, init=False)  # tokens whose text is in `_text`
    _text: str = field(default="", init=False)
    _sent: int = field(default=0, init=False)  # letters of it
    _choices: deque[tuple[int, TokenChoice]] = field(default_factory=deque, init=False)

    def push(self, token_id: int, choice: TokenChoice | None = None) -> Piece:
        """Take a token, and return what may be sent now."""
        self._ids.append(token_id)
        if choice is not None:
            self._choices.append((len(self._text), choice))
        # Tokens before the new ones are decoded along: some tokenizers join with what is there.
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if len(text) > len(known) and not text.endswith(_UNFINISHED):
            self._start, self._read = self._read, len(self._ids)
            self._text += text[len(known) :]
        num_held = self._num_held()  # which may cut the text
        return self._release(len(self._text) - num_held)

    def finish(self) -> Piece:
        """Return what was held back: the answer has ended."""
        if not self.is_stopped:
            known = self._decode(self._ids[self._start : self._read])
            self._text += self._decode(self._ids[self._start :])[len(known) :]
            self._num_held()
        return self._release(len(self._text), is_last=True)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _num_held(self) -> int:
        """Cut at a stop string; return how many letters at the end may begin one."""
        # What is sent cannot begin one: it would have been held back.
        found = [self._text.find(stop, self._sent) for stop in self.stop]
        if places := [place for place in found if place >= 0]:
            self._text, self.is_stopped = self._text[: min(places)], True
            return 0
        return max((_overlap(self._text, stop) for stop in self.stop), default=0)

    def _release(self, end: int, *, is_last: bool = False) -> Piece:
        """Return the text up to `end`, and the tokens that begin before it."""
        text, self._sent = self._text[self._sent : end], end
        released = []
        while self._choices and (is_last or self._choices[0][0] < end):
            place, choice = self._choices.popleft()
            if place < end or not self.is_stopped:
                released.append(choice)
        return Piece(text, tuple(released))


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`, but is not all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
