"""Who holds how many bytes, from one event of a step to the next, and when they are most.

Bytes are rounded as CUDA's caching allocator rounds them, so that the peak is what
`torch.cuda.max_memory_allocated` shows.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_ROUNDING = 512  # bytes: the allocator's smallest unit


@dataclass(frozen=True)
class Peak:
    """The moment of the most bytes.

    Attributes:
        nbytes: Their number.
        moment: Where in the step.
        owners: Bytes by owner at that moment.
    """

    nbytes: int = 0
    moment: str = ""
    owners: Mapping[str, int] = field(default_factory=dict)


class Ledger:
    """Accounts of bytes by owner.

    Attributes:
        moment: What is being done; whoever writes the events sets it.
        peak: The most so far.
    """

    def __init__(self, owners: Mapping[str, int] | None = None) -> None:
        self.moment = "before the first step"
        self._held: Counter[str] = Counter()
        self._total = 0
        self.peak = Peak()
        for owner, nbytes in (owners or {}).items():
            self.take(owner, nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._total

    def take(self, owner: str, nbytes: int) -> None:
        """Give `owner` so many bytes more."""
        self._add(owner, _rounded(nbytes))
        if self._total > self.peak.nbytes:
            self.peak = Peak(self._total, self.moment, dict(+self._held))

    def give(self, owner: str, nbytes: int) -> None:
        """Take so many bytes from `owner` again."""
        self._add(owner, -_rounded(nbytes))

    @contextlib.contextmanager
    def hold(self, owner: str, *sizes: int) -> Iterator[None]:
        """Let `owner` have tensors of these sizes inside the block."""
        for nbytes in sizes:
            self.take(owner, nbytes)
        yield
        for nbytes in sizes:
            self.give(owner, nbytes)

    def _add(self, owner: str, nbytes: int) -> None:
        self._held[owner] += nbytes
        self._total += nbytes


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ROUNDING) * _ROUNDING
