"""All rows looked at for what silently ruins a model, or wastes a run.

Texts were looked at while they were tokenized (`Note`); tokens are looked at here, all rows of a
split in a few array operations.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.chat import IGNORE_INDEX, ChatEncoder
from halfbyte.data.config import DataConfig
from halfbyte.data.content import text_of
from halfbyte.data.findings import Finding, Level, by_level
from halfbyte.data.gather import Gathered, Split
from halfbyte.data.length import apply_policy
from halfbyte.data.notes import Note
from halfbyte.data.overlap import duplicates, overlaps
from halfbyte.data.rows import TokenRows
from halfbyte.errors import DataError

Rows = NDArray[np.int64]
# From this share of the rows on, what is harmless in a few of them ruins a model.
RUINOUS_SHARE = 0.1
DOMINATING_SHARE = 0.9
NUM_EXAMPLES = 3
_SNIPPET = 72

# Note: (name, level, what the rows do, what to do about it)
_NOTES = {
    Note.EMPTY_TURN: (
        "empty_turns",
        Level.WARNING,
        "have a turn in which nothing is said",
        "take the turns, or the rows, out",
    ),
    Note.ROLE_ORDER: (
        "roles_out_of_order",
        Level.WARNING,
        "do not go system, user, assistant, user, assistant",
        "join turns of the same role; what follows the last assistant turn is not trained on",
    ),
    Note.UNDECODABLE: (
        "undecodable_text",
        Level.WARNING,
        "hold U+FFFD: their text was once read in the wrong encoding",
        "make the data again from their origin, reading it as what it is",
    ),
    Note.CONTROL: (
        "control_characters",
        Level.WARNING,
        "hold control characters (NUL, escape, ...)",
        "take them out, unless the model shall write them",
    ),
    Note.UNKNOWN_SPECIAL: (
        "unknown_special_tokens",
        Level.WARNING,
        "hold text that looks like a special token, but is none of this tokenizer's",
        "most likely a template was applied already, for another model: train on the messages",
    ),
    Note.SPECIAL_TEXT: (
        "special_token_text",
        Level.INFO,
        "spell a special token in a message; it is kept as text, and controls nothing",
        None,
    ),
    Note.SPECIAL_TOKEN: (
        "special_token_injected",
        Level.WARNING,
        "spell a special token in a message, and this tokenizer makes it one",
        "take it out: whoever wrote the message could end turns and open others",
    ),
    Note.EOS_APPENDED: (
        "eos_appended",
        Level.INFO,
        "were given an EOS, as the chat template leaves no stop token at their end",
        None,
    ),
    Note.REWRITTEN: (
        "rewritten_conversations",
        Level.INFO,
        "became several, as the chat template rewrites earlier turns",
        None,
    ),
}


@dataclass(frozen=True)
class _Look:
    """One split, and how to speak of its rows."""

    name: str
    data: Split
    encoder: ChatEncoder
    config: DataConfig

    def at(self, number: int) -> str:
        """Return where a source row stands and how it begins."""
        where, row = self.data.source.row(number)
        try:
            text = text_of(self.data.layout.read(row, where))
        except DataError:
            return where
        return f"{where}: {snippet(text)}"

    def rows(
        self,
        name: str,
        level: Level,
        numbers: Rows,
        said: str,
        hint: str | None = None,
    ) -> Iterator[Finding]:
        """Yield a finding about these source rows, if there are any."""
        count = len(numbers)
        if count:
            text = f"{count:,} of {self.data.num_read:,} rows of {self.data.title} {said}"
            examples = tuple(self.at(int(number)) for number in numbers[:NUM_EXAMPLES])
            allowed = level is Level.RUINS and name in self.config.allow
            level = Level.WARNING if allowed else level
            yield Finding(name, level, self.name, count, text, hint, examples, allowed)

    def share_level(self, numbers: Rows) -> Level:
        """Return how bad something is that ruins a model only in many rows."""
        many = len(numbers) >= RUINOUS_SHARE * self.data.num_read
        return Level.RUINS if many else Level.WARNING


def check(gathered: Gathered, config: DataConfig) -> list[Finding]:
    """Return what was found in all rows, the worst first."""
    found = list(_tokenizer(gathered))
    for name, data in gathered.splits.items():
        look = _Look(name, data, gathered.encoder, config)
        for looking in (_broken, _learned, _stops, _lengths, _first_tokens, _notes, _origins):
            found += looking(look)
        found += duplicates(name, data, look.at)
    if gathered.eval:
        look = _Look("eval", gathered.eval, gathered.encoder, config)
        found += overlaps(gathered.train, gathered.eval, look.at)
    return by_level(found)


def snippet(text: str) -> str:
    """Return the beginning of a text on one line, with what cannot be printed spelled out."""
    line = " ".join(text[: 4 * _SNIPPET].split())
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
    return line if len(line) <= _SNIPPET else line[: _SNIPPET - 1] + "…"


def _broken(look: _Look) -> Iterator[Finding]:
    broken = look.data.broken
    if not broken:
        return
    files = Counter(row.file for row in broken)
    first = {row.file: row.message for row in reversed(broken)}
    examples = tuple(
        f"{first[file]}" + (f" (and {count - 1:,} more of {file or 'them'})" if count > 1 else "")
        for file, count in files.items()
    )
    allowed = "unreadable_rows" in look.config.allow
    yield Finding(
        "unreadable_rows",
        Level.WARNING if allowed else Level.RUINS,
        look.name,
        len(broken),
        f"{len(broken):,} rows of {look.data.title} cannot be read or made into tokens",
        "mend them, or leave them out with allow: [unreadable_rows]",
        examples,
        allowed,
    )


def _learned(look: _Look) -> Iterator[Finding]:
    rows, facts = look.data.rows, look.data.facts
    teaches = np.isin(facts.source, rows.source[rows.supervised > 0])
    is_broken = np.isin(facts.source, list(facts.errors))
    quiet = facts.source[~teaches & ~is_broken]
    yield from look.rows(
        "nothing_supervised",
        look.share_level(quiet),
        quiet,
        "teach nothing, and are left out",
        "are there assistant turns with text? allow: [nothing_supervised] trains on the others",
    )


def _stops(look: _Look) -> Iterator[Finding]:
    rows = look.data.rows
    stops = _special_ids(look.encoder)
    if look.config.loss_on == "all":
        is_stop = np.isin(rows.labels, stops)
        totals = np.concatenate([[0], np.cumsum(is_stop)])[rows.offsets]
        without = np.diff(totals) == 0
    else:
        without = _ends_without(rows, stops)
    numbers = np.unique(rows.source[without & (rows.supervised > 0)])
    yield from look.rows(
        "no_stop",
        look.share_level(numbers),
        numbers,
        "have an answer that does not end in a stop token: the model would not learn to stop",
        "choose another chat_template or set the tokenizer's eos_token; "
        "allow: [no_stop] trains all the same",
    )


def _special_ids(encoder: ChatEncoder) -> list[int]:
    vocabulary = encoder.tokenizer.get_vocab()
    return [vocabulary[token] for token in encoder.special if token in vocabulary]


def _ends_without(rows: TokenRows, stops: list[int]) -> NDArray[np.bool_]:
    """Whether a run of learned tokens in each row ends in another token than a stop."""
    learned = rows.labels != IGNORE_INDEX
    followed = np.append(learned[1:], [False])
    followed[rows.offsets[1:] - 1] = False
    wrong = learned & ~followed & ~np.isin(rows.labels, stops)
    counts = np.diff(np.concatenate([[0], np.cumsum(wrong)])[rows.offsets])
    return np.asarray(counts > 0)


def _lengths(look: _Look) -> Iterator[Finding]:
    rows, limit = look.data.rows, look.config.max_length
    is_long = rows.lengths > limit
    if not is_long.any():
        return
    policy = look.config.over_length
    lost = apply_policy(rows, "truncate", limit, title=look.data.title)[1]
    longest = int(rows.lengths.max())
    level = {"error": Level.RUINS, "split": Level.INFO}.get(policy, Level.WARNING)
    yield from look.rows(
        "over_length",
        level,
        np.unique(rows.source[is_long]),
        f"are longer than max_length={limit} (the longest has {longest:,} tokens); cutting them "
        f"loses {lost.lost_tokens:,} tokens, {lost.lost_supervised_tokens:,} of them learned, and "
        f"the stop token of {lost.lost_stops:,} rows (over_length: {policy})",
        "raise max_length, or set over_length to truncate, split or drop",
    )


def _first_tokens(look: _Look) -> Iterator[Finding]:
    rows, tokenizer = look.data.rows, look.encoder.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or not len(rows):
        return
    starts = rows.offsets[:-1]
    first = rows.input_ids[starts] == bos
    second = rows.input_ids[np.minimum(starts + 1, len(rows.input_ids) - 1)] == bos
    yield from look.rows(
        "bos_doubled",
        Level.WARNING,
        np.unique(rows.source[first & second & (rows.lengths > 1)]),
        f"begin with {tokenizer.bos_token} twice",
        "the text, or the template twice, writes it: serving sends it once",
    )
    if list(tokenizer("a")["input_ids"])[:1] == [bos]:
        yield from look.rows(
            "bos_missing",
            Level.WARNING,
            np.unique(rows.source[~first]),
            f"do not begin with {tokenizer.bos_token}, which this tokenizer puts first",
            "begin the chat template with {{ bos_token }}",
        )


def _notes(look: _Look) -> Iterator[Finding]:
    facts = look.data.facts
    for note, (name, level, said, hint) in _NOTES.items():
        numbers = facts.source[(facts.notes & int(note)) != 0]
        yield from look.rows(name, level, numbers, said, hint)


def _origins(look: _Look) -> Iterator[Finding]:
    """Yield a finding if one of several data sets has nearly all learned tokens."""
    facts, rows = look.data.facts, look.data.rows
    names = [origin for origin in facts.origins if origin is not None]
    if look.name != "train" or len(set(names)) < 2:
        return
    tokens: Counter[str] = Counter()
    place = np.searchsorted(facts.source, rows.source)
    for index, count in zip(place.tolist(), rows.supervised.tolist(), strict=True):
        tokens[facts.origins[index] or "(none)"] += count
    (name, most), total = tokens.most_common(1)[0], tokens.total()
    if total and most >= DOMINATING_SHARE * total:
        yield Finding(
            "dominating_source",
            Level.WARNING,
            look.name,
            0,
            f"{most / total:.0%} of the learned tokens of {look.data.title} are from {name!r}; "
            f"the other {len(tokens) - 1} sources hardly count",
            "repeat rows of the others, or take rows of this one out",
        )


def _tokenizer(gathered: Gathered) -> Iterator[Finding]:
    """Yield what is remarkable about tokenizer and template, whatever the rows are."""
    tokenizer = gathered.encoder.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield Finding(
            "pad_is_eos",
            Level.INFO,
            "",
            0,
            f"the padding token is the stop token, {tokenizer.pad_token}; here stopping is learned "
            "all the same, as padding is masked by length and not by token",
        )
    if gathered.train.layout.format == "text":
        return
    if spelled := gathered.encoder.frame_tokens:
        yield Finding(
            "template_tokens",
            Level.WARNING,
            "",
            0,
            f"the chat template writes {', '.join(spelled)}, which this tokenizer does not have: "
            "to the model they are ordinary letters",
            "choose a chat_template that was made for this model, unless it was trained so",
        )
