import pytest

from halfbyte.data.content import content_notes, text_of
from halfbyte.data.formats import Example
from halfbyte.data.notes import Note

KNOWN = frozenset({"<|im_end|>", "</s>"})


def talk(*turns):
    return Example([{"role": role, "content": content} for role, content in turns])


def notes_of(text):
    return content_notes(talk(("user", text), ("assistant", "ok")), KNOWN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text, 1 < 2, [INFO] and a|b", Note.NONE),
        ("tab\tand\r\nline", Note.NONE),
        ("caf\ufffd", Note.UNDECODABLE),
        ("NUL \x00", Note.CONTROL),
        ("escape \x1b[0m", Note.CONTROL),
        ("C1 \x85", Note.CONTROL),
        (" \n ", Note.EMPTY_TURN),
        ("known <|im_end|> and </s>", Note.NONE),
        ("<|eot_id|>", Note.UNKNOWN_SPECIAL),
        ("[INST] hello [/INST]", Note.UNKNOWN_SPECIAL),
        ("<<SYS>>", Note.UNKNOWN_SPECIAL),
        ("<start_of_turn>", Note.UNKNOWN_SPECIAL),
        ("<\uff5cUser\uff5c>", Note.UNKNOWN_SPECIAL),
        ("<b>html</b> and <s", Note.NONE),
    ],
)
def test_what_text_holds(text, expected):
    assert notes_of(text) == expected
    if expected is not Note.EMPTY_TURN:
        assert content_notes(Example([], text=text), KNOWN) == expected


CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TOOL, SYSTEM = {"role": "tool", "content": "4"}, {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("messages", "in_order"),
    [
        ([USER, BOT], True),
        ([SYSTEM, USER, BOT, USER, BOT], True),
        ([USER, CALLS, TOOL, BOT], True),
        ([USER, CALLS, TOOL, TOOL, CALLS, TOOL, BOT], True),
        ([USER, CALLS], True),
        ([], False),
        ([SYSTEM], False),
        ([BOT], False),
        ([USER, BOT, USER], False),
        ([USER, USER, BOT], False),
        ([USER, BOT, BOT], False),
        ([USER, SYSTEM, BOT], False),
        ([USER, BOT, TOOL, BOT], False),
        ([USER, CALLS, USER, BOT], False),
    ],
)
def test_order_of_roles(messages, in_order):
    notes = content_notes(Example(messages), KNOWN)
    assert bool(notes & Note.ROLE_ORDER) != in_order
    assert not notes & Note.EMPTY_TURN


def test_text_is_what_is_said_and_not_the_system_prompt():
    assert text_of(Example([SYSTEM, USER, CALLS, BOT])) == "a\nb"
    assert text_of(Example([], text="document")) == "document"
