"""Base and adapter become one tensor after the other of the merged model.

A tensor is worked on in slabs of rows: each is taken to float32, updated, rounded once and put in
its place, so that beside the tensor itself there are only slabs. What rounding did to the update is
measured on the way.

In 4 bits a merged weight is Q(W + D): the base's own 16-bit weight and the update are added in
float32 and quantized once. Q(dequantized + D) would give nearly all the old codes back, because a
dequantized weight lies in the middle of what rounds to it.

Shapes: [out, in] for weights, as transformers' nn.Linear has them.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.adapters.files import AdapterFiles
from halfbyte.errors import AdapterError
from halfbyte.export.base import BaseWeights, quantized
from halfbyte.export.plan import Plan, Step
from halfbyte.export.updates import EmbeddingUpdate, Load, LoraUpdate, ReplaceUpdate, Update
from halfbyte.quant.config import NF4Config
from halfbyte.quant.layout import to_tensors
from halfbyte.quant.weight import QuantizedWeight

# Elements of a slab: 32 MiB of float32, large enough for any processor to be busy with.
_SLAB_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Rounding:
    """What rounding did to the update D of a weight W, which became M.

    Attributes:
        update: |D| / |W|, how large the update is.
        lost: |M - (W + D)| / |D|, the rounding error against the update.
        kept: <M - W, D> / |D|^2, how much of the update is there, along itself: 1 is all of it. In
            4 bits W is the quantized base, as training saw it.
    """

    update: float
    lost: float
    kept: float


@dataclass(frozen=True)
class Merged:
    """One tensor of the merged model.

    Attributes:
        name: Its name in the checkpoint.
        value: Its value, rounded to the dtype that it is written in, or to 4 bits.
        is_changed: Whether it is another one than the base's checkpoint holds.
        rounding: What rounding did to the update; None where nothing was added.
        is_transposed: Whether the model has a 4-bit value the other way round (Conv1D).
    """

    name: str
    value: Tensor | QuantizedWeight
    is_changed: bool = False
    rounding: Rounding | None = None
    is_transposed: bool = False

    def dense(self) -> Tensor:
        """Return the weight that a model of plain layers would have."""
        if not isinstance(self.value, QuantizedWeight):
            return self.value
        weight = self.value.dequantize()
        return weight.T.contiguous() if self.is_transposed else weight

    def tensors(self) -> dict[str, Tensor]:
        """Return what is written, by name."""
        if isinstance(self.value, QuantizedWeight):
            return to_tensors(self.name, self.value)
        return {self.name: self.value}


@dataclass(frozen=True)
class Merger:
    """Makes the tensors of a merged model.

    Attributes:
        plan: What to do.
        base: The base's dense tensors.
        adapter: Where the updates are read from.
        dtype: dtype of all floating-point tensors; None keeps each one's own.
        quant: How to hold linear layers in 4 bits; None writes them dense.
        device: Where the sums are formed.
    """

    plan: Plan
    base: BaseWeights
    adapter: AdapterFiles
    dtype: torch.dtype | None
    quant: NF4Config | None
    device: torch.device

    def tensors(self, skip: Collection[str] = ()) -> Iterator[Merged]:
        """Yield the merged model's tensors but those in `skip`, in the order of the plan.

        Raises:
            AdapterError: an update does not fit its tensor, or a sum overflows.
        """
        packed = set() if self.quant is None else self.base.held_in_4_bits(self.quant)
        for step in self.plan.steps:
            if step.name in skip:
                continue
            if self.quant is not None and step.name in packed:
                yield self._packed(step, self.quant)
            elif step.updates:
                yield self._dense(step)
            else:
                tensor = self.base.tensor(step.source)
                is_changed = not self.base.is_as_stored(step.source)
                yield Merged(step.name, tensor.to(self._target(step, tensor)), is_changed)

    def _target(self, step: Step, source: Tensor | None) -> torch.dtype:
        """Return the dtype to write; training may have cast the weight before it quantized it."""
        stored = self.base.stored_dtype(step.source)
        own = stored if stored is not None or source is None else source.dtype
        is_number = own is None or own.is_floating_point
        return self.dtype if self.dtype is not None and is_number else own or torch.float32

    def _dense(self, step: Step) -> Merged:
        """Return W + D, rounded once."""
        total = self._open(step)
        source, dtype = total.source, self._target(step, total.source)
        # In place where that is possible: a large table is then in memory only once.
        is_fit = source is not None and source.dtype == dtype and source.shape == total.shape
        written = source if is_fit and source is not None else torch.empty(total.shape, dtype=dtype)
        sums = _Sums()
        for rows, before, updated in total.slabs():
            rounded = updated.to(dtype)
            if not torch.isfinite(rounded).all():
                raise AdapterError(
                    f"{step.name} overflows {str(dtype).removeprefix('torch.')} after merging",
                    hint="merge into bfloat16 or float32 with dtype=...",
                )
            if total.is_sum:
                sums.add(before, updated, rounded.float())
            written[rows] = rounded.to(written.device)
        tensor = written.T.contiguous() if total.is_transposed else written
        return Merged(step.name, tensor, is_changed=True, rounding=sums.result())

    def _packed(self, step: Step, config: NF4Config) -> Merged:
        """Return Q(W + D)."""
        total, sums = self._open(step), _Sums()
        if total.source is not None and not step.updates:
            value = quantized(total.source.to(self.device).contiguous(), config)
        else:
            dense = torch.empty(total.shape, dtype=torch.float32, device=self.device)
            for rows, _, updated in total.slabs():
                dense[rows] = updated
            value = quantized(dense, config)
            del dense
        if total.is_sum and total.source is not None:
            seen = quantized(total.source.to(self.device).contiguous(), config).dequantize()
            found = value.dequantize(seen.dtype)
            for rows, before, updated in total.slabs():
                base = seen[rows].float()
                sums.add(base, base + updated - before, found[rows].float())
        return Merged(
            step.name,
            dataclasses.replace(value, dtype=self._target(step, total.source)),
            is_changed=True,
            rounding=sums.result(),
            is_transposed=total.is_transposed,
        )

    def _open(self, step: Step) -> "_Total":
        """Read what W + D is made of."""

        @functools.cache
        def load(key: str) -> Tensor:
            return self.adapter.tensors[key]

        # The base's own tensor is not read where a trained copy takes its place.
        is_copy = bool(step.updates) and isinstance(step.updates[0], ReplaceUpdate)
        is_read = not (is_copy and self.base.is_as_stored(step.source))
        source = self.base.tensor(step.source) if is_read else None
        shape = self.base.shape(step.source)
        is_transposed = step.source in self.base.transposed
        if is_transposed:
            source, shape = None if source is None else source.T, shape[::-1]
        for update in step.updates:
            shape = update.check(shape, load)
        return _Total(
            source=source,
            shape=shape,
            updates=step.updates,
            load=load,
            device=self.device,
            is_transposed=is_transposed,
        )


@dataclass(frozen=True, kw_only=True)
class _Total:
    """W + D of one tensor, slab by slab.

    Attributes:
        source: W; None where a trained copy takes its place.
        shape: Shape of W + D.
        is_transposed: Whether `source` is a view of what the checkpoint holds the other way round.
    """

    source: Tensor | None
    shape: tuple[int, ...]
    updates: tuple[Update, ...]
    load: Load
    device: torch.device
    is_transposed: bool

    @property
    def is_sum(self) -> bool:
        """Whether something is added to W, so that rounding can lose some of it."""
        return any(isinstance(each, LoraUpdate | EmbeddingUpdate) for each in self.updates)

    def slabs(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows, W and W + D there, in float32 on the device."""
        height = max(1, _SLAB_ELEMENTS // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], height):
            rows = slice(start, min(start + height, self.shape[0]))
            before = updated = self._rows(rows)
            for update in self.updates:
                updated = update.apply(updated, rows, self.load)
                if isinstance(update, ReplaceUpdate):
                    before = updated
            yield rows, before, updated

    def _rows(self, rows: slice) -> Tensor:
        """Return rows of W; those of new tokens, which follow it, are zero before their update."""
        count = rows.stop - rows.start
        found = torch.zeros(count, *self.shape[1:], dtype=torch.float32, device=self.device)
        if self.source is not None:
            there = self.source[rows]
            found[: len(there)] = there.to(self.device)
        return found


class _Sums:
    """Adds up what `Rounding` is made of, in float64."""

    def __init__(self) -> None:
        self.base = self.update = self.error = self.along = 0.0

    def add(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Add a slab of W, W + D and M, all float32."""
        update = exact - before
        self.base += _dot(before, before)
        self.update += _dot(update, update)
        error = rounded - exact
        self.error += _dot(error, error)
        self.along += _dot(rounded - before, update)

    def result(self) -> Rounding | None:
        """Return the quotients; an update of nothing is whole."""
        if not self.base and not self.update:
            return None
        if not self.update:
            return Rounding(update=0.0, lost=0.0, kept=1.0)
        return Rounding(
            update=math.sqrt(self.update / self.base) if self.base else math.inf,
            lost=math.sqrt(self.error / self.update),
            kept=self.along / self.update,
        )


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum(dtype=torch.float64))
