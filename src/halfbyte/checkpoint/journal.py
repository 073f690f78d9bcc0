"""What of a long piece of writing is on disk already, so that a restart goes on from there.

A journal is a file of JSON lines. The first one says what is being written; each further one is
added, and synced, when a part is whole. A torn last line, which a crash can leave, is ignored.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOURNAL_FILE = "journal.jsonl"


class Journal:
    """The parts that are done, in the order in which they were done.

    Args:
        folder: Existing folder that is written into.
        purpose: What is being written, as JSON values. What a journal of another purpose lists is
            forgotten.

    Attributes:
        path: The file.
        entries: One JSON object for each part.
    """

    def __init__(self, folder: Path, purpose: Mapping[str, Any]) -> None:
        self.path = folder / JOURNAL_FILE
        found = _read(self.path)
        is_same = found[:1] == [json.loads(json.dumps(purpose))]
        self._purpose = dict(purpose)
        self.entries = found[1:] if is_same else []
        self.keep(len(self.entries))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Note that a part is whole; its bytes must be synced before."""
        self.entries.append(dict(entry))
        self._write("a", [entry])

    def keep(self, count: int) -> None:
        """Forget all entries but the first `count`."""
        self.entries = self.entries[:count]
        self._write("w", [self._purpose, *self.entries])

    def _write(self, mode: str, objects: list[Mapping[str, Any]]) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(each) + "\n" for each in objects)
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the objects in the lines of a journal, as far as they are whole."""
    found: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            if not line.endswith("\n"):
                break
            found.append(json.loads(line))
    except (OSError, ValueError):
        return found
    return found
