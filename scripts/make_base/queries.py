"""Makes requests in English with their meaning in small query notations, and the way back.

The notations are chains of calls, pipes, links, command lines, JSON, clauses and forms. SQL is
not among them: the demonstration's task is SQL, and the base model must not have seen it.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from scripts.make_base import words as w
from scripts.make_base.prose import Document, Messages, chat


@dataclass(frozen=True)
class Field:
    """A property of a kind of thing: its name and how its values are drawn."""

    name: str
    draw: Callable[[random.Random], str | int]
    numeric: bool = False


@dataclass(frozen=True)
class Request:
    """What is asked: which things, which of their properties, under which conditions."""

    kind: str
    want: list[str]
    conditions: list[tuple[str, str, str | int]]
    sort: tuple[str, bool] | None
    take: int | None
    measure: tuple[str, str] | None


_KINDS = w.ANIMALS + w.THINGS + w.JOBS + w.SPOTS
_TEXT: dict[str, Callable[[random.Random], str | int]] = {
    "colour": lambda r: r.choice(w.COLOURS), "owner": w.person, "town": w.place,
    "material": lambda r: r.choice(w.MATERIALS), "day": lambda r: r.choice(w.DAYS),
    "maker": lambda r: w.invented(r).capitalize(), "mood": lambda r: r.choice(w.ADJECTIVES),
    "spot": lambda r: r.choice(w.SPOTS), "subject": lambda r: r.choice(w.SUBJECTS),
    "code": w.code, "month": lambda r: r.choice(w.MONTHS), "friend": w.person,
    "label": w.invented, "food": lambda r: r.choice(w.FOODS),
}  # fmt: skip
_NUMERIC = (
    "size", "weight", "cost", "width", "height", "speed", "score", "depth", "length", "distance",
    "power", "rank",
)  # fmt: skip
_MORE = ("more than", "over", "above", "greater than", "higher than")
_LESS = ("less than", "under", "below", "smaller than", "lower than")
_MEASURES = {"average": "mean", "total": "sum", "highest": "top", "lowest": "low"}


def _named(rng: random.Random, name: str) -> str:
    """Return the field's own name, or at times any word, so that names are copied, not learnt."""
    if rng.random() < 0.6:
        return name
    return rng.choice((w.invented(rng), rng.choice(w.THINGS), rng.choice(w.SUBJECTS)))


def _fields(rng: random.Random) -> list[Field]:
    texts = [Field(_named(rng, name), _TEXT[name]) for name in rng.sample(sorted(_TEXT), 3)]
    numbers = [Field(_named(rng, name), w.number, numeric=True) for name in rng.sample(_NUMERIC, 2)]
    return [*texts, *numbers]


def draw_request(rng: random.Random) -> Request:
    """Draw a request about a random kind of thing with random properties."""
    fields = _fields(rng)
    conditions = []
    for field in rng.sample(fields, rng.choice((0, 1, 1, 1, 2, 2))):
        sign = (
            rng.choice(("more", "less", "is")) if field.numeric else rng.choice(("is", "is", "not"))
        )
        conditions.append((field.name, sign, field.draw(rng)))
    numeric = [field.name for field in fields if field.numeric]
    draw = rng.random()
    measure = sort = take = None
    if draw < 0.2:
        measure = ("count", "")
    elif draw < 0.4:
        measure = (rng.choice(sorted(_MEASURES)), rng.choice(numeric))
    elif draw < 0.7:
        sort = (rng.choice(numeric), rng.random() < 0.5)
        take = rng.randint(1, 20) if rng.random() < 0.6 else None
    want = rng.sample([field.name for field in fields], rng.choice((1, 1, 2)))
    kind = w.plural(rng.choice(_KINDS)) if rng.random() < 0.85 else w.invented(rng)
    return Request(kind, want, conditions, sort, take, measure)


def _condition_in_english(rng: random.Random, name: str, sign: str, value: str | int) -> str:
    if sign == "more":
        return f"{name} {rng.choice(_MORE)} {value}"
    if sign == "less":
        return f"{name} {rng.choice(_LESS)} {value}"
    if sign == "not":
        return f"{name} {rng.choice(('not', 'other than', 'that is not'))} {value}"
    return rng.choice((f"{name} {value}", f"{name} equal to {value}", f"{value} as {name}"))


def in_english(rng: random.Random, request: Request) -> str:
    """Return the request as a person would put it."""
    kind, want = request.kind, " and ".join(request.want)
    rest = " and ".join(_condition_in_english(rng, *c) for c in request.conditions)
    rest = f" {rng.choice(('with', 'that have', 'having'))} {rest}" if rest else ""
    if request.measure:
        name, field = request.measure
        if name == "count":
            start = rng.choice(
                (f"How many {kind} are there", f"Count the {kind}", f"Number of {kind}")
            )
        else:
            start = rng.choice(
                (f"What is the {name} {field} of {kind}", f"Find the {name} {field} of the {kind}")
            )
        return start + rest
    start = rng.choice(
        (
            f"Show the {want} of {kind}",
            f"List {want} for {kind}",
            f"Give me the {want} of {kind}",
            f"What are the {want} of {kind}",
            f"Find {kind}{rest} and tell their {want}",
        )
    )
    if " and tell" not in start:
        start += rest
    if request.sort:
        field, down = request.sort
        start += rng.choice((", sorted by", ", ordered by", " by")) + f" {field}"
        start += rng.choice((" from high to low", ", highest first")) if down else ""
    if request.take:
        start += rng.choice((f", only {request.take}", f", the first {request.take}"))
    return start


def _value(value: str | int) -> str:
    return str(value) if isinstance(value, int) else f'"{value}"'


_SIGN = {"more": ">", "less": "<", "is": "=", "not": "!="}


def as_pipe(r: Request) -> str:
    """books | colour = "red" | sort size down | first 3 | show owner."""
    parts = [r.kind, *(f"{n} {_SIGN[s]} {_value(v)}" for n, s, v in r.conditions)]
    if r.measure:
        return " | ".join([*parts, " ".join(x for x in r.measure if x)])
    if r.sort:
        parts.append(f"sort {r.sort[0]} {'down' if r.sort[1] else 'up'}")
    if r.take:
        parts.append(f"first {r.take}")
    return " | ".join([*parts, "show " + ", ".join(r.want)])


def as_chain(r: Request) -> str:
    """books.keep(colour == "red").sort(size).take(3).get(owner)."""
    text = r.kind
    for name, sign, value in r.conditions:
        text += f".keep({name} {'==' if sign == 'is' else _SIGN[sign]} {_value(value)})"
    if r.measure:
        name, field = r.measure
        return text + (".count()" if name == "count" else f".{_MEASURES[name]}({field})")
    if r.sort:
        text += f".sort({'-' if r.sort[1] else ''}{r.sort[0]})"
    if r.take:
        text += f".take({r.take})"
    return text + f".get({', '.join(r.want)})"


def as_link(r: Request) -> str:
    """/books?colour=red&sort=-size&top=3&fields=owner."""
    marks = {"more": ".gt=", "less": ".lt=", "is": "=", "not": ".not="}
    parts = [f"{n}{marks[s]}{str(v).replace(' ', '+')}" for n, s, v in r.conditions]
    if r.measure:
        parts.append("do=" + ".".join(x for x in r.measure if x))
    else:
        if r.sort:
            parts.append(f"sort={'-' if r.sort[1] else ''}{r.sort[0]}")
        if r.take:
            parts.append(f"top={r.take}")
        parts.append("fields=" + ",".join(r.want))
    return f"/{r.kind}?" + "&".join(parts)


def as_command(r: Request) -> str:
    """look books --colour 'red' --size-over 10 --top 3 --tell owner."""
    marks = {"more": "-over", "less": "-under", "is": "", "not": "-not"}
    parts = ["look", r.kind]
    parts += [f"--{n}{marks[s]} {v if isinstance(v, int) else repr(v)}" for n, s, v in r.conditions]
    if r.measure:
        return " ".join([*parts, "--" + "-".join(x for x in r.measure if x)])
    if r.sort:
        parts.append(f"--by {r.sort[0]}" + (" --down" if r.sort[1] else ""))
    if r.take:
        parts.append(f"--top {r.take}")
    return " ".join([*parts, "--tell " + ",".join(r.want)])


def as_json(r: Request) -> str:
    """{"things": "books", "if": [["colour", "is", "red"]], "tell": ["owner"]}."""
    data: dict[str, object] = {"things": r.kind}
    if r.conditions:
        data["if"] = [list(c) for c in r.conditions]
    if r.measure:
        data["measure"] = [x for x in r.measure if x]
    else:
        if r.sort:
            data["sort"] = [r.sort[0], "down" if r.sort[1] else "up"]
        if r.take:
            data["top"] = r.take
        data["tell"] = r.want
    return json.dumps(data)


def as_clauses(r: Request) -> str:
    """(tell owner (books (colour is 'red')) (top 3))."""
    inner = " ".join(
        [r.kind, *(f"({n} {s} {v if isinstance(v, int) else repr(v)})" for n, s, v in r.conditions)]
    )
    if r.measure:
        return f"({' '.join(x for x in r.measure if x)} ({inner}))"
    extra = f" (sort {r.sort[0]}{' down' if r.sort[1] else ''})" if r.sort else ""
    extra += f" (top {r.take})" if r.take else ""
    return f"(tell {' '.join(r.want)} ({inner}){extra})"


def as_form(r: Request) -> str:
    """Lines of a form: Things, If, Sort, Top, Tell."""
    lines = [f"things: {r.kind}", *(f"if: {n} {_SIGN[s]} {v}" for n, s, v in r.conditions)]
    if r.measure:
        return "\n".join([*lines, "measure: " + " ".join(x for x in r.measure if x)])
    if r.sort:
        lines.append(f"sort: {r.sort[0]} {'down' if r.sort[1] else 'up'}")
    if r.take:
        lines.append(f"top: {r.take}")
    return "\n".join([*lines, "tell: " + ", ".join(r.want)])


NOTATIONS: dict[str, Callable[[Request], str]] = {
    "pipe": as_pipe, "chain": as_chain, "link": as_link, "command": as_command,
    "JSON": as_json, "clauses": as_clauses, "form": as_form,
}  # fmt: skip


def query(rng: random.Random) -> Document:
    """Put a request into a notation, back into English, or from one notation into another."""
    name = rng.choice(sorted(NOTATIONS))
    write = NOTATIONS[name]
    draw = rng.random()
    messages: Messages = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        request = draw_request(rng)
        english = in_english(rng, request) + rng.choice(("", "", ".", "?"))
        if draw < 0.65:
            lead = f"Write as a {name} query: " if not messages else ""
            messages += chat(lead + english, write(request))
        elif draw < 0.8:
            lead = "Say in English:\n" if not messages else ""
            messages += chat(lead + write(request), english)
        else:
            other = rng.choice(sorted(NOTATIONS))
            messages += chat(f"From {name} to {other}: {write(request)}", NOTATIONS[other](request))
    return messages
