"""The demonstration's task: questions in plain English, answered by SQL over four tables.

    How many books are there in the dark fantasy genre?
    select count(*) from books where genre = 'dark fantasy'

A question is drawn as a shape (list, count, average, ranking, grouping), a table, its columns and
up to two conditions; together these are its *combination*. What a condition compares with is its
*value*. The same seed makes the same rows on every machine.

The held-out rows measure understanding and not memory: none of their values occurs in the training
rows, and a third or more of them have a combination that no training row has.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from halfbyte.demo.tables import TABLES, Column, Table

TRAIN_ROWS = 3200
HELD_OUT_ROWS = 200
SEED = 20_24
_UNSEEN_ONE_IN = 6  # share of the combinations that only held-out rows may have
_AGGREGATES = {"average": "avg", "highest": "max", "lowest": "min", "total": "sum"}


@dataclass(frozen=True)
class Question:
    """One question: its row, its combination, and the values in it."""

    prompt: str
    completion: str
    combination: str
    values: tuple[str, ...]

    @property
    def row(self) -> dict[str, str]:
        """The row of the data set."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Task:
    """The questions to train on and the held-out ones."""

    train: list[Question]
    held_out: list[Question]


def make_task(seed: int = SEED) -> Task:
    """Make the task: TRAIN_ROWS and HELD_OUT_ROWS questions, all different."""
    rng = random.Random(seed)
    train = _draw_questions(rng, TRAIN_ROWS, is_held_out=False)
    held_out = _draw_questions(rng, HELD_OUT_ROWS, is_held_out=True)
    return Task(train, held_out)


def write_task(folder: Path, task: Task) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl (prompt, completion) and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, questions in zip(paths, (task.train, task.held_out), strict=True):
        lines = [json.dumps(question.row) + "\n" for question in questions]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def _is_kept_back(kind: str, text: str, one_in: int) -> bool:
    """Say, the same on every machine, whether only held-out rows may have this."""
    return hashlib.sha256(f"{kind}:{text}".encode()).digest()[0] % one_in == 0


def _draw_questions(rng: random.Random, count: int, *, is_held_out: bool) -> list[Question]:
    """Draw questions until `count` different ones are found."""
    found: dict[str, Question] = {}
    while len(found) < count:
        question = _draw(rng, is_held_out=is_held_out)
        unseen = _is_kept_back("combination", question.combination, _UNSEEN_ONE_IN)
        # Without a value only its combination can set a question apart from the training rows.
        if unseen > is_held_out or (is_held_out and not question.values and not unseen):
            continue
        # Unseen combinations are rare, so in the held-out rows each second seen one is dropped.
        if is_held_out and not unseen and rng.random() < 0.6:
            continue
        found.setdefault(question.prompt, question)
    return list(found.values())


def _value(rng: random.Random, column: Column, *, is_held_out: bool) -> str:
    """Draw a value; a quarter of all values is kept for the held-out rows."""
    low, high, step = column.span
    while True:
        value = rng.choice(column.values) if column.values else str(rng.randrange(low, high, step))
        if _is_kept_back("value", value, 4) == is_held_out:
            return value


def _condition(rng: random.Random, column: Column, *, is_held_out: bool) -> tuple[str, str, str]:
    """Return a condition in English, in SQL, and the value in it."""
    value = _value(rng, column, is_held_out=is_held_out)
    if column.values is not None:
        return rng.choice(column.says).format(value), f"{column.name} = '{value}'", value
    phrases, sign = rng.choice(((column.says, ">"), (column.below, "<")))
    return rng.choice(phrases).format(value), f"{column.name} {sign} {value}", value


def _draw(rng: random.Random, *, is_held_out: bool) -> Question:
    """Draw one question."""
    table = rng.choice(TABLES)
    columns = rng.sample(table.columns, rng.choice((0, 1, 1, 2, 2)))
    conditions = [_condition(rng, column, is_held_out=is_held_out) for column in columns]
    said = "".join(
        f" {english}" if i == 0 else f" and {english}"
        for i, (english, _, _) in enumerate(conditions)
    )
    where = " where " + " and ".join(sql for _, sql, _ in conditions) if conditions else ""
    shape = rng.choice(("list", "list", "count", "aggregate", "ranking", "grouping"))
    if shape == "grouping" and not _open_texts(table, where):
        shape = "count"
    english, sql, detail = _SHAPES[shape](rng, table, said, where)
    signs = ",".join(" ".join(sql.split()[:2]) for _, sql, _ in conditions)
    return Question(
        prompt=english,
        completion=sql,
        combination=f"{shape}/{table.name}/{detail}/{signs}",
        values=tuple(value for _, _, value in conditions),
    )


def _open_texts(table: Table, where: str) -> list[str]:
    """Return the text columns that the conditions leave open."""
    return [column for column in table.texts if f" {column} = " not in where]


def _list(rng: random.Random, table: Table, said: str, where: str) -> tuple[str, str, str]:
    column = rng.choice([table.key, *table.numbers, *_open_texts(table, where)])
    if column == table.key and rng.random() < 0.5:
        english = f"Which {table.name} are there{said}?"
    else:
        lead = rng.choice(("Show the", "List the", "What is the"))
        english = f"{lead} {column} of {table.name}{said}" + ("?" if lead[0] == "W" else "")
    return english, f"select {column} from {table.name}{where}", column


def _count(rng: random.Random, table: Table, said: str, where: str) -> tuple[str, str, str]:
    lead, end = rng.choice((("How many", "?"), ("Count the", ""), ("Number of", "")))
    there = " are there" if end else ""
    return f"{lead} {table.name}{there}{said}{end}", f"select count(*) from {table.name}{where}", ""


def _aggregate(rng: random.Random, table: Table, said: str, where: str) -> tuple[str, str, str]:
    name, function = rng.choice(list(_AGGREGATES.items()))
    column = rng.choice(table.numbers)
    lead, end = rng.choice((("What is the", "?"), ("Find the", "")))
    english = f"{lead} {name} {column} of {table.name}{said}{end}"
    return english, f"select {function}({column}) from {table.name}{where}", f"{name} {column}"


def _ranking(rng: random.Random, table: Table, said: str, where: str) -> tuple[str, str, str]:
    column, limit = rng.choice(table.numbers), rng.randint(2, 9)
    name, order = rng.choice((("highest", " desc"), ("lowest", "")))
    english = f"Top {limit} {table.name}{said} by {name} {column}"
    sql = f"select {table.key} from {table.name}{where} order by {column}{order} limit {limit}"
    return english, sql, f"{name} {column}"


def _grouping(rng: random.Random, table: Table, said: str, where: str) -> tuple[str, str, str]:
    column = rng.choice(_open_texts(table, where))
    if rng.random() < 0.5:
        value, head = "count(*)", rng.choice(("Number of", "Count"))
        detail = "count"
    else:
        number = rng.choice(table.numbers)
        value, head, detail = f"avg({number})", f"Average {number} of", number
    english = f"{head} {table.name}{said} per {column}"
    sql = f"select {column}, {value} from {table.name}{where} group by {column}"
    return english, sql, f"{detail} {column}"


_SHAPES = {
    "list": _list,
    "count": _count,
    "aggregate": _aggregate,
    "ranking": _ranking,
    "grouping": _grouping,
}
