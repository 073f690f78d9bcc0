"""Keys and values of all running answers in one tensor a layer, whose rows join and leave.

Rows are aligned on the left: token p of an answer stands at index p, whoever else is there.

    row 0   k k k k k k .        running answers are rows 0 to n - 1, so that a step reads a
    row 1   k k k . . . .        view; when a row leaves, the last row moves into its place
    row 2   k k k k k . .
    row 3   . . . . . . .        free

What stands behind a row's last token is never read: the mask of `serve.forward` ends there.
Memory: 2 · layers · rows · key-value heads · tokens · head size · bytes of the dtype, taken at
once when the first row joins, so that a server that starts has what it needs.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class _Rows:
    """Where the running step writes, and how far it reads; all layers share one."""

    def __init__(self) -> None:
        self.index: Tensor = torch.empty(0, dtype=torch.int64)  # [n], the rows 0 to n - 1
        self.positions: Tensor = torch.empty(0, dtype=torch.int64)  # [n], of each row's new token
        self.width = 0


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, `[rows, heads, tokens, head size]`."""

    is_sliding = False

    def __init__(self, rows: _Rows, num_rows: int, num_tokens: int) -> None:
        super().__init__()
        self._rows, self._num_rows, self._num_tokens = rows, num_rows, num_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(like: Tensor) -> Tensor:
            return like.new_zeros(self._num_rows, like.shape[1], self._num_tokens, like.shape[3])

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def write(self, row: int, key_states: Tensor, value_states: Tensor) -> None:
        """Put keys and values `[heads, tokens, head size]` at the start of a row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states[None], value_states[None])
        self.keys[row, :, : key_states.shape[1]] = key_states  # type: ignore[index]
        self.values[row, :, : value_states.shape[1]] = value_states  # type: ignore[index]

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a row's first tokens over another row."""
        for tensor in (self.keys, self.values):
            if tensor is not None:
                tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one new token a row, and return all that the rows have, up to the longest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self.keys
        values: Any = self.values
        where = (self._rows.index, slice(None), self._rows.positions)
        keys[where] = key_states[:, :, 0]
        values[where] = value_states[:, :, 0]
        n, width = key_states.shape[0], self._rows.width
        return keys[:n, :, :width], values[:n, :, :width]

    def get_seq_length(self) -> int:
        return max(self._rows.width - 1, 0)

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        return self._rows.width, 0

    def get_max_length(self) -> int:
        return self._num_tokens

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`, under the name that transformers had until 5.17."""
        return self._num_tokens


class SlotCache(Cache):
    """A transformers cache for steps of one token in each of the rows 0 to n - 1.

    Args:
        num_layers: Decoder layers of the model.
        num_rows: Most answers that run at once.
        num_tokens: Longest prompt with its answer.
    """

    def __init__(self, num_layers: int, num_rows: int, num_tokens: int) -> None:
        self._rows = _Rows()
        self._slots = [_SlotLayer(self._rows, num_rows, num_tokens) for _ in range(num_layers)]
        super().__init__(layers=self._slots)  # type: ignore[arg-type]

    def join(self, row: int, prompt: DynamicCache, source: int, num_tokens: int) -> None:
        """Copy a prompt's first tokens from row `source` of the cache that it was read into."""
        theirs: list[Any] = list(prompt.layers)
        for mine, other in zip(self._slots, theirs, strict=True):
            keys, values = (t[source, :, :num_tokens] for t in (other.keys, other.values))
            mine.write(row, keys, values)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a row over another."""
        for layer in self._slots:
            layer.move(source, target, num_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, once a row has joined."""
        tensors = [t for layer in self._slots for t in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def begin_step(self, positions: Tensor, width: int) -> None:
        """Say where the next forward pass writes.

        Args:
            positions: int64 `[n]`, the index of each row's new token.
            width: The largest of them and one.
        """
        self._rows.index = torch.arange(positions.shape[0], device=positions.device)
        self._rows.positions, self._rows.width = positions, width
