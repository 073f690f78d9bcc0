"""Makes exercises in following instructions: copy, change, sort, look up, and re-format.

Many of them work on words or sentences of the real text, so that every token is copied often.
Those makers take the material beside the random source.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from scripts.make_base import words as w
from scripts.make_base.prose import Document, Messages, chat


@dataclass(frozen=True)
class Material:
    """Words and sentences of the real text that exercises are made of."""

    words: list[str]
    sentences: list[str]


def _tokens(rng: random.Random, material: Material, least: int, most: int) -> list[str]:
    """Draw what an exercise works on: words, invented words, numbers, names, codes."""
    draws: tuple[Callable[[], str], ...] = (
        lambda: rng.choice(material.words),
        lambda: rng.choice(material.words),
        lambda: rng.choice(w.THINGS + w.ANIMALS + w.FOODS),
        lambda: w.invented(rng),
        lambda: str(w.number(rng)),
        lambda: w.person(rng),
        lambda: w.code(rng),
    )
    one_kind = rng.choice(draws) if rng.random() < 0.5 else None
    return [(one_kind or rng.choice(draws))() for _ in range(rng.randint(least, most))]


def repeat(rng: random.Random, material: Material) -> Document:
    """Say a sentence or a row of words again."""
    text = (
        rng.choice(material.sentences)
        if rng.random() < 0.4
        else rng.choice((" ", ", ", "; ", "\n")).join(_tokens(rng, material, 1, 12))
    )
    ask = rng.choice(
        ("Repeat: {}", "Say this again: {}", "Copy the text.\n{}", "Echo {}", 'Repeat "{}".')
    )
    if rng.random() < 0.2:
        return f"{text}\n{text}"
    return chat(ask.format(text), text)


def change(rng: random.Random, material: Material) -> Document:
    """Change a row of words in one named way."""
    items = _tokens(rng, material, 3, 7)
    k = rng.randrange(len(items))
    new = _tokens(rng, material, 1, 1)[0]
    row = " ".join(items)
    swapped = [new if item == items[k] else item for item in items]
    ordinal = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")[k]
    tasks = (
        (f"Write in capitals: {row}", row.upper()),
        (f"Write in small letters: {row}", row.lower()),
        (f"Reverse the order: {row}", " ".join(items[::-1])),
        (f"What is the {ordinal} word? {row}", items[k]),
        (f"What comes first? {row}", items[0]),
        (f"What comes last? {row}", items[-1]),
        (f"Leave out the {ordinal} word: {row}", " ".join(items[:k] + items[k + 1 :])),
        (f"Replace {items[k]} with {new}: {row}", " ".join(swapped)),
        (f"How many words are here? {row}", str(len(row.split()))),
        (f"Put commas between: {row}", ", ".join(items)),
        (f"One on each line: {row}", "\n".join(items)),
        (f"Put each in quotes: {row}", " ".join(f'"{i}"' for i in items)),
        (f"Put each in single quotes: {row}", " ".join(f"'{i}'" for i in items)),
        (f"Put in brackets: {row}", f"({row})"),
        (f"Write twice: {row}", f"{row} {row}"),
        (f"Add {new} at the end: {row}", f"{row} {new}"),
        (f"Add {new} at the start: {row}", f"{new} {row}"),
        (f"Join with underscores: {row}", "_".join(items)),
        (f"Number them: {row}", "\n".join(f"{n}. {i}" for n, i in enumerate(items, 1))),
    )  # fmt: skip
    return chat(*rng.choice(tasks))


def cloze(rng: random.Random, material: Material) -> Document:
    """Find in a sentence of real text what stands beside a word, or complete the copy."""
    pieces = rng.choice(material.sentences).split()
    if len(pieces) < 4:
        pieces += _tokens(rng, material, 4, 4)
    k = rng.randrange(1, len(pieces) - 1)
    text = " ".join(pieces)
    tasks = (
        (f'{text}\n\nWhich word follows "{pieces[k]}"?', pieces[pieces.index(pieces[k]) + 1]),
        (f"{text}\n\nWhat is the last word?", pieces[-1]),
        (f"{text}\n\nWhat is the first word?", pieces[0]),
        (f"{text}\n\nFill the gap: {' '.join([*pieces[:k], '___', *pieces[k + 1 :]])}", pieces[k]),
        (f"{text}\n\nGo on: {' '.join(pieces[:k])}", " ".join(pieces[k:])),
    )
    return chat(*rng.choice(tasks))


def order(rng: random.Random, material: Material) -> Document:
    """Sort, compare and count numbers or words."""
    numbers = rng.sample(range(10 ** rng.randint(2, 4)), rng.randint(2, 6))
    names = rng.sample(w.THINGS + w.ANIMALS, rng.randint(2, 6))
    row, listed = ", ".join(map(str, numbers)), ", ".join(names)
    tasks = (
        (f"Sort from low to high: {row}", ", ".join(map(str, sorted(numbers)))),
        (f"Sort from high to low: {row}", ", ".join(map(str, sorted(numbers, reverse=True)))),
        (f"Which is the largest? {row}", str(max(numbers))),
        (f"Which is the smallest? {row}", str(min(numbers))),
        (f"Put in alphabetical order: {listed}", ", ".join(sorted(names))),
        (f"How many things are listed? {listed}", str(len(names))),
        (f"Is {numbers[0]} more than {numbers[1]}?", "Yes" if numbers[0] > numbers[1] else "No"),
        (f"Is {names[0]} in this list? {', '.join(names[1:])}", "No"),
        (f"Is {names[0]} in this list? {listed}", "Yes"),
    )
    return chat(*rng.choice(tasks))


def lookup(rng: random.Random, material: Material) -> Document:
    """Look values up by their keys, and keys by their values."""
    size = rng.randint(2, 7)
    keys = list(dict.fromkeys(_tokens(rng, material, size, size)))
    values = _tokens(rng, material, len(keys), len(keys))
    mark = rng.choice((": ", " = ", " -> ", " is ", ","))
    listing = rng.choice(("\n", "; ")).join(
        f"{k}{mark}{v}" for k, v in zip(keys, values, strict=True)
    )
    if rng.random() < 0.2:
        return listing + "\n" + listing
    picks = rng.sample(range(len(keys)), min(len(keys), rng.randint(1, 3)))
    first, *rest = picks
    ask = rng.choice(("What is {}?", "Look up {}.", "Value of {}?", "{}?"))
    messages = chat(f"{listing}\n\n{ask.format(keys[first])}", values[first])
    for pick in rest:
        messages += chat(ask.format(keys[pick]), values[pick])
    return messages


_FIELDS: dict[str, Callable[[random.Random], str]] = {
    "name": w.person,
    "city": w.place,
    "job": lambda rng: rng.choice(w.JOBS),
    "colour": lambda rng: rng.choice(w.COLOURS),
    "material": lambda rng: rng.choice(w.MATERIALS),
    "item": lambda rng: rng.choice(w.THINGS),
    "animal": lambda rng: rng.choice(w.ANIMALS),
    "subject": lambda rng: rng.choice(w.SUBJECTS),
    "weekday": lambda rng: rng.choice(w.DAYS),
    "month": lambda rng: rng.choice(w.MONTHS),
    "code": w.code,
    "label": w.invented,
    "size": lambda rng: str(w.number(rng, most=3)),
    "age": lambda rng: str(rng.randint(1, 99)),
    "cost": lambda rng: str(w.number(rng)),
    "count": lambda rng: str(w.number(rng, most=2)),
    "length": lambda rng: str(w.number(rng, most=4)),
}


def _records(rng: random.Random, count: int) -> list[dict[str, str]]:
    fields = rng.sample(sorted(_FIELDS), rng.randint(2, 5))
    return [{field: _FIELDS[field](rng) for field in fields} for _ in range(count)]


def _typed(record: dict[str, str]) -> dict[str, str | int]:
    return {key: int(value) if value.isdigit() else value for key, value in record.items()}


_SHAPES: dict[str, Callable[[dict[str, str]], str]] = {
    "JSON": lambda r: json.dumps(_typed(r)),
    "key: value lines": lambda r: "\n".join(f"{k}: {v}" for k, v in r.items()),
    "a CSV row": lambda r: ",".join(r.values()),
    "a sentence": lambda r: "The " + ", the ".join(f"{k} is {v}" for k, v in r.items()) + ".",
    "assignments": lambda r: "; ".join(
        f"{k} = {v}" if v.isdigit() else f"{k} = '{v}'" for k, v in r.items()
    ),
    "XML": lambda r: "".join(f"<{k}>{v}</{k}>" for k, v in r.items()),
    "a call": lambda r: (
        "record(" + ", ".join(f"{k}={json.dumps(v)}" for k, v in _typed(r).items()) + ")"
    ),
}  # fmt: skip


def reshape(rng: random.Random, material: Material) -> Document:
    """Write a record in another notation, or take one field out of it."""
    record = _records(rng, 1)[0]
    source, target = rng.sample(sorted(_SHAPES), 2)
    text = _SHAPES[source](record)
    if rng.random() < 0.3:
        field = rng.choice(sorted(record))
        return chat(f"{text}\n\nWhat is the {field}?", record[field])
    if source == "a CSV row":
        text = ",".join(record) + "\n" + text
    return chat(f"Write this as {target}:\n{text}", _SHAPES[target](record))


def table(rng: random.Random, material: Material) -> Document:
    """Read a small table: look up, filter, count."""
    rows = _records(rng, rng.randint(2, 6))
    fields = list(rows[0])
    mark = rng.choice((",", " | ", "\t"))
    text = "\n".join(mark.join(row) for row in [fields, *(list(r.values()) for r in rows)])
    key, field = rng.sample(fields, 2)
    row = rng.choice(rows)
    matches = [r[field] for r in rows if r[key] == row[key]]
    tasks = [
        (f"What is the {field} where the {key} is {row[key]}?", ", ".join(matches)),
        (f"List every {field}.", ", ".join(r[field] for r in rows)),
        ("How many rows are there?", str(len(rows))),
        ("What are the columns?", ", ".join(fields)),
        (f"How many rows have {row[key]} as {key}?", str(len(matches))),
        ("Show the last row.", mark.join(rows[-1].values())),
    ]
    first, second = rng.sample(tasks, 2)
    messages = chat(f"{text}\n\n{first[0]}", first[1])
    return messages + chat(*second) if rng.random() < 0.4 else messages


_RULES: tuple[Callable[[str, str], str], ...] = (
    lambda a, b: f"{b} {a}",
    lambda a, b: f"{a}-{b}",
    lambda a, b: f"({a}, {b})",
    lambda a, b: f"{a} = {b}",
    lambda a, b: f"{b}:{a}",
    lambda a, b: f"'{a}' and '{b}'",
    lambda a, b: f"<{a}> {b}",
    lambda a, b: a,
    lambda a, b: b,
    lambda a, b: f"{a} {a} {b}",
    lambda a, b: f"{a.upper()} {b}",
    lambda a, b: f"put {a} on {b}",
    lambda a, b: f'{{"{a}": "{b}"}}',
)


def pattern(rng: random.Random, material: Material) -> Document:
    """Show a rule by examples, then apply it."""
    rule = rng.choice(_RULES)
    lead, mid, tail = (rng.choice(material.words) for _ in range(3))
    pairs = [_tokens(rng, material, 2, 2) for _ in range(rng.randint(3, 6))]
    shown = [(f"{lead} {a} {mid} {b} {tail}", rule(a, b)) for a, b in pairs]
    if rng.random() < 0.5:
        return "\n".join(f"{left} => {right}" for left, right in shown)
    messages: Messages = []
    for left, right in shown:
        messages += chat(left, right)
    return messages
