"""What can be remarkable about a row, found while it is tokenized."""

import enum


class Note(enum.IntFlag):
    """Marks of a row; kept with its tokens, so values never change their meaning."""

    NONE = 0

    EOS_APPENDED = 1
    """The template left no stop token after the last turn."""
    REWRITTEN = 2
    """One of several rows of a conversation whose earlier turns the template rewrites."""
    SPECIAL_TEXT = 4
    """A message spells a special token; it was tokenized as text."""
    SPECIAL_TOKEN = 8
    """A message spells a special token, and this tokenizer cannot keep it as text."""
    NO_STOP = 16
    """There is no stop token: the tokenizer has no EOS."""
    EMPTY_TURN = 32
    """Somebody says nothing, and calls no tool."""
    ROLE_ORDER = 64
    """Turns do not alternate, or begin or end with the wrong one."""
    UNDECODABLE = 128
    """The replacement character U+FFFD: text that was once read in the wrong encoding."""
    CONTROL = 256
    """A control character that is no tab and no line break."""
    UNKNOWN_SPECIAL = 512
    """Text that looks like a special token of some model, but not of this one."""
