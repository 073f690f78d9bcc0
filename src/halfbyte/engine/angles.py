"""The rotations of a batch's positions, for models whose layers do not all rotate alike.

Shape letters: B sequences, S tokens of each, R rotated elements of a head.

Gemma 3 has one base for the layers that slide over a window and one for the others; in SmolLM3
every fourth layer does not rotate, which is a rotation by zero. Each kind is one table.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.engine.families import NO_ROPE


class Angles:
    """Tables of cos and sin.

    Args:
        rotary: The transformers module that makes one.
        kinds: Of each layer: a layer type that `rotary` knows, `NO_ROPE`, or None.
    """

    def __init__(self, rotary: Any, kinds: Sequence[str | None]) -> None:
        self._rotary = rotary
        self._kinds = list(dict.fromkeys(kinds))
        self.tables = [self._kinds.index(kind) for kind in kinds]

    def __call__(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, `[tables, B * S, R]`; `tables` says which is whose.

        Args:
            like: Has their dtype and device.
            position_ids: `[B, S]`.
        """
        pairs = [self._table(kind, like, position_ids) for kind in self._kinds]
        both = ([table.flatten(0, 1) for table in tables] for tables in zip(*pairs, strict=True))
        cos, sin = map(torch.stack, both)
        return cos, sin

    def _table(self, kind: str | None, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if kind == NO_ROPE:
            cos, sin = self._rotary(like, positions)
            return torch.ones_like(cos), torch.zeros_like(sin)
        cos, sin = self._rotary(like, positions, *(() if kind is None else (kind,)))
        return cos, sin
