"""What is wrong with the data, in the order of what it costs.

| level   | meaning                                                                       |
|---------|-------------------------------------------------------------------------------|
| ruins   | the model would learn the wrong thing: training stops unless told otherwise    |
| warning | most likely not meant                                                          |
| info    | good to know                                                                   |
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from rich.text import Text

from halfbyte.errors import DataError


class Level(enum.StrEnum):
    """How bad a finding is."""

    RUINS = "ruins"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True)
class Finding:
    """One thing that was found, with how often and where.

    Args:
        name: What `allow` and JSON call it.
        level: How bad it is.
        split: "train" or "eval"; empty where it is not about rows.
        count: Rows that have it.
        text: A sentence that says what was found, with the numbers.
        hint: What to do about it.
        examples: Some of the rows: where they stand, and how they look.
        allowed: It would ruin a model, but the settings allow it.
    """

    name: str
    level: Level
    split: str
    count: int
    text: str
    hint: str | None = None
    examples: tuple[str, ...] = ()
    allowed: bool = False

    def __rich__(self) -> Text:
        """Return it as lines for a terminal."""
        text = Text(no_wrap=False)
        level = "allowed" if self.allowed else self.level.value
        text.append(f"{level:>7}", style=_STYLES[self.level])
        text.append(f"  {self.name}: {self.text}")
        for example in self.examples:
            text.append(f"\n         · {example}", style="dim")
        if self.hint and self.level is not Level.INFO:
            text.append(f"\n         {self.hint}", style="italic")
        return text


_STYLES = {Level.RUINS: "bold red", Level.WARNING: "yellow", Level.INFO: "cyan"}
_ORDER = list(Level)


def by_level(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings, the worst first."""
    return sorted(findings, key=lambda finding: _ORDER.index(finding.level))


def ruinous(findings: Iterable[Finding]) -> list[Finding]:
    """Return those that stop a run."""
    return [finding for finding in findings if finding.level is Level.RUINS]


def refuse(findings: Iterable[Finding]) -> None:
    """Raise DataError if something was found that ruins a model."""
    found = ruinous(findings)
    if not found:
        return
    worst = found[0]
    more = f" (and {len(found) - 1} more such findings)" if len(found) > 1 else ""
    where = f"; {worst.examples[0]}" if worst.examples else ""
    raise DataError(f"{worst.name}: {worst.text}{where}{more}", hint=worst.hint)
