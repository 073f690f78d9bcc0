"""The smallest changes with which a step fits, each of them tried through the planner.

What can be set otherwise is ordered by how much a person feels it: where the optimizer's state is,
what is computed twice, how many rows go together; then what changes the result: the optimizer's
bits, the rows' length, the adapters; and last the card. Offered are single changes, and two
together where neither is enough or the rows can stay longer.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.plan.cards import GIB, SIZES, usable_bytes
from halfbyte.plan.fit import max_tokens
from halfbyte.plan.owners import ADAPTERS, GRADIENTS, OPTIMIZER
from halfbyte.plan.predict import Planner, Prediction, Setting
from halfbyte.plan.smaller import rank_of, smaller_adapters, target_names

_DIVISORS = (2, 4, 8, 16)
_LEAST_RANK = 4
_LEAST_TOKENS = 64
# By how much the rows must be longer for a second change to be worth it.
_LONGER = 1.15
# By how much another card is larger for sure: drivers leave less than the number on the box.
_LARGER = 1.1


@dataclass(frozen=True)
class Change:
    """What to set otherwise, and the peak with it."""

    text: str
    peak_bytes: int


@dataclass(frozen=True)
class _Adapters:
    """What the adapters are, as `smaller_adapters` takes it."""

    divisor: int = 1
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Try:
    """A step with some things set otherwise; `texts` says which."""

    setting: Setting
    adapters: _Adapters = _Adapters()
    texts: tuple[str, ...] = ()

    def but(self, text: str, **settings: Any) -> "_Try":
        """Return it with other settings."""
        return replace(self, setting=replace(self.setting, **settings), texts=(*self.texts, text))


class _Planners:
    """Planners of one model with its own and with smaller adapters."""

    def __init__(self, planner: Planner) -> None:
        self.model = planner.model
        self.why_unfused = planner.why_unfused
        own = (ADAPTERS, GRADIENTS, OPTIMIZER)
        self._fixed = sum(n for owner, n in planner.persistent.items() if owner not in own)
        self._known = {_Adapters(): planner}
        self._most: dict[tuple[_Adapters, Setting], int] = {}

    @contextlib.contextmanager
    def of(self, adapters: _Adapters) -> Iterator[Planner]:
        """Yield the planner; it is right inside the block only."""
        divisor, targets = adapters.divisor, adapters.targets
        with smaller_adapters(self.model, divisor=divisor, targets=targets):
            if adapters not in self._known:
                self._known[adapters] = Planner(self.model)
            yield self._known[adapters]

    def peak_bytes(self, step: _Try) -> int | None:
        """Return a step's peak where it fits."""
        if not self._has_room(step):
            return None
        with self.of(step.adapters) as planner:
            prediction = planner.predict(step.setting)
        return prediction.peak.nbytes if prediction.fits else None

    def most_tokens(self, step: _Try) -> int:
        """Return the most tokens of a micro-step that fit."""
        if not self._has_room(step):
            return 0
        key = step.adapters, replace(step.setting, rows=1, length=1)
        if key not in self._most:
            with self.of(step.adapters) as planner:
                found = max_tokens(planner, step.setting, step.setting.total_bytes or 0)
            self._most[key] = found
        return self._most[key]

    def _has_room(self, step: _Try) -> bool:
        """Whether at least the weights fit."""
        return self._fixed < usable_bytes(step.setting.total_bytes or 0)


@dataclass(frozen=True)
class _Move:
    """One thing that can be set otherwise.

    Args:
        kind: Moves of one kind exclude each other.
        cost: How much a person feels it.
        apply: Returns the changed step; None where there is nothing to change.
    """

    kind: str
    cost: float
    apply: Callable[[_Planners, _Try], _Try | None]


def changes(
    planner: Planner, prediction: Prediction, *, card_bytes: int | None = None, count: int = 3
) -> list[Change]:
    """Return the smallest changes with which a step fits, the least felt first.

    Args:
        planner: Of the model.
        prediction: Of the step.
        card_bytes: Memory of the card at hand, where the step cannot have all of it.
        count: How many to return; fewer where there are no more.
    """
    if prediction.setting.total_bytes is None:
        return []
    planners, asked = _Planners(planner), _Try(prediction.setting)
    found: list[Change] = []
    taken: list[tuple[set[str], _Try]] = []
    for moves in _combinations(planner, card_bytes or prediction.setting.total_bytes):
        step = _apply(planners, asked, moves)
        kinds = {move.kind for move in moves}
        if step is None or any(_is_enough(kinds, step, *other) for other in taken):
            continue
        peak = planners.peak_bytes(step)
        if peak is not None:
            found.append(Change(" with ".join(step.texts), peak))
            taken.append((kinds, step))
            if len(found) == count:
                break
    return found


def _is_enough(kinds: set[str], step: _Try, found_kinds: set[str], found: _Try) -> bool:
    """Whether what was found spares these changes: with less of them, nothing is smaller."""
    is_longer = step.setting.length >= _LONGER * found.setting.length
    is_wider = step.adapters.divisor < found.adapters.divisor
    return found_kinds <= kinds and not is_longer and not is_wider


def _apply(planners: _Planners, step: _Try, moves: tuple[_Move, ...]) -> _Try | None:
    for move in moves:
        changed = move.apply(planners, step)
        if changed is None:
            return None
        step = changed
    return step


def _combinations(planner: Planner, card_bytes: int) -> list[tuple[_Move, ...]]:
    """Return single moves and pairs, the least felt first."""
    moves = [*_SETTINGS, *_adapter_moves(planner), *_cards(card_bytes)]
    singles = [(move,) for move in moves]
    # What is searched for (rows, length) comes last: it depends on the other.
    pairs = [
        (b, a) if a.kind == "rows" else (a, b)
        for a, b in itertools.combinations(moves, 2)
        if a.kind != b.kind
    ]
    return sorted([*singles, *pairs], key=lambda some: (sum(m.cost for m in some), len(some)))


def _page(_: _Planners, step: _Try) -> _Try | None:
    if step.setting.is_paged:
        return None
    return step.but(f"optim: paged_adamw_{step.setting.state_bits}bit", is_paged=True)


def _eight_bits(_: _Planners, step: _Try) -> _Try | None:
    if step.setting.state_bits == 8:
        return None
    return step.but("optim: paged_adamw_8bit", state_bits=8, is_paged=True)


def _recompute(planners: _Planners, step: _Try) -> _Try | None:
    if planners.why_unfused is None:
        return None if step.setting.memory == "lean" else step.but("memory: lean", memory="lean")
    if step.setting.is_checkpointed:
        return None
    return step.but("gradient_checkpointing: true", is_checkpointed=True)


def _fewer_rows(planners: _Planners, step: _Try) -> _Try | None:
    if step.setting.rows == 1:
        return None
    rows = planners.most_tokens(step) // step.setting.length
    if not 0 < rows < step.setting.rows:
        return None
    return step.but(f"per_device_train_batch_size: {rows}", rows=rows)


def _shorter(planners: _Planners, step: _Try) -> _Try | None:
    tokens = planners.most_tokens(step)
    if not _LEAST_TOKENS <= tokens < step.setting.length:
        return None
    alone = " with per_device_train_batch_size: 1" if step.setting.rows > 1 else ""
    return step.but(f"max_length: {tokens}{alone}", rows=1, length=tokens)


_SETTINGS = (
    _Move("optim", 1, _page),
    _Move("memory", 2, _recompute),
    _Move("rows", 2, _fewer_rows),
    _Move("optim", 3, _eight_bits),
    _Move("rows", 4, _shorter),
)


def _adapter_moves(planner: Planner) -> list[_Move]:
    """Return moves to smaller ranks, and to adapters on attention alone."""
    rank = rank_of(planner.model)
    every, attention = target_names(planner.model)

    def move(cost: float, text: str, adapters: _Adapters) -> _Move:
        def apply(_: _Planners, step: _Try) -> _Try:
            return replace(step, adapters=adapters, texts=(*step.texts, text))

        return _Move("adapters", cost, apply)

    moves = [
        move(5 + index, f"r: {rank // divisor}", _Adapters(divisor=divisor))
        for index, divisor in enumerate(_DIVISORS)
        if rank // divisor >= _LEAST_RANK
    ]
    if 0 < len(attention) < len(every):
        text, targets = f"target_modules: [{', '.join(attention)}]", tuple(attention)
        moves.append(move(7.5, text, _Adapters(targets=targets)))
        if rank // 2 >= _LEAST_RANK:
            half = _Adapters(divisor=2, targets=targets)
            moves.append(move(9.5, f"r: {rank // 2} with {text}", half))
    return moves


def _cards(card_bytes: int) -> list[_Move]:
    """Return moves to larger cards."""

    def move(index: int, size: int) -> _Move:
        return _Move(
            "card",
            12 + index,
            lambda _, step: step.but(f"a card of {size} GB", total_bytes=size * GIB),
        )

    larger = (size for size in SIZES if size * GIB > _LARGER * card_bytes)
    return [move(index, size) for index, size in enumerate(larger)]
