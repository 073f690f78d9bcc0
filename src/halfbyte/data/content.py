"""What is odd about the text of a row, before any template sees it."""

import itertools
import re
from collections.abc import Sequence

from halfbyte.data.formats import Example, Message
from halfbyte.data.notes import Note

# C0 without tab, line feed and carriage return; DEL; C1.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# How the families write special tokens: <|im_end|>, [INST], <<SYS>>, <start_of_turn>, </s>, <pad>.
LOOKS_SPECIAL = re.compile(
    r"<\|[A-Za-z0-9_/.\-]{1,40}\|>|<\uff5c[^\uff5c\s]{1,40}\uff5c>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|</?s>|<(?:bos|eos|pad|unk|mask)>"
)


def text_of(example: Example) -> str:
    """Return what is said in a row, without system messages: those are the same in many rows."""
    if example.text is not None:
        return example.text
    said = (m.get("content") for m in example.messages if m["role"] not in ("system", "developer"))
    return "\n".join(text for text in said if text)


def content_notes(example: Example, known: frozenset[str]) -> Note:
    """Return what is remarkable about a row's text and turns.

    Args:
        example: The row.
        known: The tokenizer's own added tokens.
    """
    notes = _text_notes(example.text or "", known)
    for message in example.messages:
        notes |= _text_notes(message.get("content") or "", known)
        if not (message.get("content") or "").strip() and not message.get("tool_calls"):
            notes |= Note.EMPTY_TURN
    if example.text is None and _out_of_order(example.messages):
        notes |= Note.ROLE_ORDER
    return notes


def _text_notes(text: str, known: frozenset[str]) -> Note:
    notes = Note.NONE
    if "\ufffd" in text:
        notes |= Note.UNDECODABLE
    if _CONTROL.search(text):
        notes |= Note.CONTROL
    if ("<" in text or "[" in text) and any(
        match not in known for match in LOOKS_SPECIAL.findall(text)
    ):
        notes |= Note.UNKNOWN_SPECIAL
    return notes


_FOLLOWS = {
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}


def _out_of_order(messages: Sequence[Message]) -> bool:
    """Whether turns are not: system, then user and assistant in turn, the assistant last.

    A tool's results follow the assistant's call, and are followed by the assistant.
    """
    turns = ["call" if message.get("tool_calls") else message["role"] for message in messages]
    while turns[:1] in (["system"], ["developer"]):
        turns.pop(0)
    if turns[:1] != ["user"] or turns[-1] not in ("assistant", "call"):
        return True
    return any(after not in _allowed(before) for before, after in itertools.pairwise(turns))


def _allowed(turn: str) -> tuple[str, ...]:
    following = _FOLLOWS.get(turn, ())
    return (*following, "call") if "assistant" in following else following
