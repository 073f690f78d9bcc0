"""The tables that the demonstration's questions are about, and what their columns may hold.

Texts are composed of two parts, so that each column has dozens of values and most are rare: a model
has to copy them from the question, it cannot know them by heart.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column, what it may be compared with, and how people say so.

    Attributes:
        name: Its name in the table.
        says: Phrases for a condition, with `{}` for the value: for a text "equals", for a number
            "more than".
        below: Phrases for "less than", for a number.
        values: The texts that it may equal; None for a number.
        span: Lowest and highest number, and the step between them.
    """

    name: str
    says: tuple[str, ...]
    below: tuple[str, ...] = ()
    values: tuple[str, ...] | None = None
    span: tuple[int, int, int] = (0, 0, 1)


@dataclass(frozen=True)
class Table:
    """A table; `key` is the column that names its rows."""

    name: str
    key: str
    columns: tuple[Column, ...]

    @property
    def numbers(self) -> list[str]:
        """Names of the columns that hold numbers."""
        return [column.name for column in self.columns if column.values is None]

    @property
    def texts(self) -> list[str]:
        """Names of the columns that hold text, without the key."""
        return [column.name for column in self.columns if column.values is not None]


def _text(name: str, values: tuple[str, ...], *says: str) -> Column:
    return Column(name, says, values=values)


def _number(name: str, span: tuple[int, int, int], above: str, below: str) -> Column:
    more = (f"with {name} above {{}}", f"with {name} over {{}}", above)
    less = (f"with {name} below {{}}", f"with {name} under {{}}", below)
    return Column(name, more, below=less, span=span)


def _composed(first: str, second: str, between: str = "") -> tuple[str, ...]:
    return tuple(f"{a}{between}{b}" for a in first.split() for b in second.split())


_CITIES = _composed(
    "Ash Black Brook Clear Fair Glen Green Hart King Lake Maple Mill New North Oak Red River South "
    "Stone Sun West White Win Wood",
    "bury dale field ford haven land mont port ton ville",
)
_PEOPLE = _composed(
    "Ander Bal Cal Dor Eller Fal Gar Hol Jen Kel Lan Mar Nor Pal Ros San Tor Val Wal Zim",
    "berg den kov ler man mer ney ski son well",
)
_AIRLINES = _composed("Air Blue Cloud East Euro Jet Nord Sky Star Trans", "bird line star way wing")
_BRANDS = _composed("Bel Cor Dex Fin Lux Mira Nova Opti Sol Vel", "bo dex lon max mo ro tec va")
_TEAMS = _composed(
    "cloud data east field home north south web west young",
    "design finance quality research sales security support training",
    between=" ",
)
_GENRES = _composed(
    "classic dark epic family modern short true urban",
    "crime drama fantasy history horror poetry romance travel",
    between=" ",
)
_CATEGORIES = _composed(
    "bath camping garden kitchen kids music office pet sports travel",
    "bags books boxes chairs games lamps shoes tools",
    between=" ",
)
TABLES = (
    Table(
        "employees",
        "name",
        (
            _text("team", _TEAMS, "in the {} team", "working in {}"),
            _text("city", _CITIES, "from {}", "based in {}"),
            _number("salary", (20_000, 99_000, 500), "paid more than {}", "paid less than {}"),
            _number("age", (20, 69, 1), "older than {}", "younger than {}"),
        ),
    ),
    Table(
        "books",
        "title",
        (
            _text("author", _PEOPLE, "by {}", "written by {}"),
            _text("genre", _GENRES, "in the {} genre", "of genre {}"),
            _number("pages", (80, 990, 5), "longer than {} pages", "shorter than {} pages"),
            _number("year", (1900, 2024, 1), "published after {}", "published before {}"),
        ),
    ),
    Table(
        "products",
        "name",
        (
            _text("brand", _BRANDS, "made by {}", "of brand {}"),
            _text("category", _CATEGORIES, "in the {} category", "of category {}"),
            _number("price", (5, 995, 5), "costing more than {}", "costing less than {}"),
            _number("stock", (10, 900, 10), "having more than {} left", "having less than {} left"),
        ),
    ),
    Table(
        "flights",
        "number",
        (
            _text("airline", _AIRLINES, "operated by {}", "of airline {}"),
            _text("destination", _CITIES, "to {}", "going to {}"),
            _number("fare", (40, 980, 10), "dearer than {}", "cheaper than {}"),
            _number("seats", (50, 400, 5), "with more than {} seats", "with fewer than {} seats"),
        ),
    ),
)
