"""Which of llama.cpp's pre-tokenizers a byte-level tokenizer has.

A GGUF file cannot hold the pattern by which text is cut before merging; it holds a name
(`tokenizer.ggml.pre`), and llama.cpp has the patterns. The name is found here by comparing patterns
(llama.cpp's own converter hashes what a tokenizer makes of a test string, so a vocabulary that it
has not seen gets none).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import CheckpointError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENGLISH_CPP = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN35 = r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER_CPP, _LOWER_CPP = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_DIGITS, _BYTE_LEVEL = "digits", "byte level"  # tokenizers' own pre-tokenizers, without a pattern


def _cased(upper: str, lower: str, suffix: str, digits: str) -> str:
    """Return the pattern of tekken and GPT-4o, which cuts words at capitals."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers.

    Args:
        name: What `tokenizer.ggml.pre` says.
        steps: The steps of the Hugging Face pre-tokenizer that does the same.
        patterns: llama.cpp's patterns, each applied to the pieces of the one before.
        ignore_merges: A word that is a token of its own is taken whole.
    """

    name: str
    steps: tuple[str, ...]
    patterns: tuple[str, ...]
    ignore_merges: bool = False


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_BYTE_LEVEL,), (_GPT2,)),
    PreTokenizer("smollm", (_DIGITS, _BYTE_LEVEL), (r"\p{N}", _GPT2)),
    PreTokenizer("llama-bpe", (_ENGLISH + _LLAMA3,), (_ENGLISH_CPP + _LLAMA3,), ignore_merges=True),
    PreTokenizer("smaug-bpe", (_ENGLISH + _LLAMA3,), (_ENGLISH_CPP + _LLAMA3,)),
    PreTokenizer("qwen2", (_ENGLISH + _QWEN2,), (_ENGLISH_CPP + _QWEN2,)),
    PreTokenizer("qwen35", (_ENGLISH + _QWEN35,), (_ENGLISH_CPP + _QWEN35,)),
    PreTokenizer(
        "tekken",
        (_cased(_UPPER, _LOWER, "", r"\p{N}"),),
        (_cased(_UPPER_CPP, _LOWER_CPP, "", r"\p{N}"),),
        ignore_merges=True,
    ),
    PreTokenizer(
        "gpt-4o",
        (_cased(_UPPER, _LOWER, _ENGLISH + "?", r"\p{N}{1,3}"),),
        (_cased(_UPPER_CPP, _LOWER_CPP, _ENGLISH_CPP + "?", r"\p{N}{1,3}"),),
    ),
)


def find_pre_tokenizer(backend: Mapping[str, Any]) -> PreTokenizer:
    """Return llama.cpp's pre-tokenizer for a byte-level tokenizer.

    Args:
        backend: What tokenizer.json holds.

    Raises:
        CheckpointError: llama.cpp has none that cuts text in the same way.
    """
    steps = _steps(backend["pre_tokenizer"])
    ignore_merges = bool(backend["model"].get("ignore_merges"))
    fitting = [found for found in PRE_TOKENIZERS if found.steps == steps]
    for found in fitting:
        if found.ignore_merges == ignore_merges:
            return found
    raise CheckpointError(
        f"the tokenizer cuts text by {' then '.join(steps) or 'nothing'}"
        + (f" with ignore_merges={ignore_merges}" if fitting else "")
        + ", which llama.cpp is not known to do",
        hint="known are the ways of " + ", ".join(found.name for found in PRE_TOKENIZERS),
    )


def pre_tokenizer_named(name: str) -> PreTokenizer | None:
    """Return the pre-tokenizer that `tokenizer.ggml.pre` names, if it is one of ours."""
    return next((found for found in PRE_TOKENIZERS if found.name == name), None)


def _steps(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the steps of tokenizer.json's pre-tokenizer: patterns, or the name of a kind."""
    kind = settings["type"]
    if kind == "Sequence":
        return tuple(step for part in settings["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not settings.get("add_prefix_space"):
        return (_BYTE_LEVEL,) if settings.get("use_regex", True) else ()
    if kind == "Digits" and settings.get("individual_digits"):
        return (_DIGITS,)
    pattern = settings.get("pattern", {})
    is_plain = settings.get("behavior") == "Isolated" and not settings.get("invert")
    if kind == "Split" and is_plain and "Regex" in pattern:
        return (str(pattern["Regex"]),)
    return (str(dict(settings)),)
