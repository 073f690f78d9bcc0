"""The bytes of one micro-step through transformers' own layers: run without memory, and counted.

Forward and backward run on fake tensors, which have shapes and no bytes, and every tensor that an
operation makes is written into the ledger until nobody holds it. So any architecture is counted,
whatever autograd saves for it. A few layers are run; each more adds what the last ones added.
Attention is replaced by what the fused kernels keep: query, key, value, output, a float32 a row.

Not seen are workspaces inside of kernels and experts, whose sizes depend on the data.
"""

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from halfbyte.errors import ConfigError
from halfbyte.memory.fused_step import LOGITS, WEIGHTS
from halfbyte.memory.ledger import Ledger, Peak

_ATTENTION = "halfbyte_plan"
# Layers that are run; even numbers, since some families alternate between two kinds.
_TRACED = (2, 4)
ACTIVATIONS = "activations"


class _Attention(torch.autograd.Function):
    """The tensors of flash attention, without their values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        log_sum_exp = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        accumulator = query.new_empty(query.shape, dtype=torch.float32)
        found = tuple(torch.empty_like(t) for t in (query, key, value))
        del accumulator
        return found


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)


class _Counting(TorchDispatchMode):
    """Writes the tensors that operations make into a ledger, and their end."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self._seen: set[int] = set()
        self.owner = ACTIVATIONS

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # transformers asks whether a row is one document
        found = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        with self.ledger.hold(WEIGHTS, _dequantized_bytes(func, args)):
            for leaf in leaves:
                self._count(leaf.untyped_storage())
        return found

    def ignore(self, *tensors: Tensor) -> None:
        """Leave out tensors that are there for the whole run."""
        self._seen.update(t.untyped_storage()._cdata for t in tensors)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.ledger.take(self.owner, nbytes)
        weakref.finalize(storage, self._forget, key, self.owner, nbytes)

    def _forget(self, key: int, owner: str, nbytes: int) -> None:
        self._seen.discard(key)
        self.ledger.give(owner, nbytes)


def _dequantized_bytes(func: Any, args: Any) -> int:
    """Return the bytes of the matrix that a product with a 4-bit weight makes and drops."""
    if func.namespace != "halfbyte":
        return 0
    shape = next((arg for arg in args if isinstance(arg, list) and _are_sizes(arg)), [0])
    return math.prod(shape) * int(args[0].element_size())


def _are_sizes(values: list[Any]) -> bool:
    return len(values) == 2 and all(isinstance(value, int) for value in values)


def trace_step(
    ledger: Ledger, causal: Any, *, batch: int, length: int, labels: int, chunk_rows: int
) -> None:
    """Write the peak of a micro-step of `batch` rows of `length` tokens into the ledger.

    Args:
        ledger: Holds what is there before.
        causal: An adapted causal language model, in training mode; it may be on the meta device.
        batch: Rows.
        length: Tokens of a row.
        labels: Tokens that have a label.
        chunk_rows: Labelled tokens whose logits are made at once.
    """
    num_layers = len(_layers(causal)[1])
    few, more = (min(count, num_layers) for count in _TRACED)
    peaks = [
        _trace(causal, count, batch=batch, length=length, labels=labels, chunk_rows=chunk_rows)
        for count in {few: 0, more: 0}
    ]
    first, last = peaks[0], peaks[-1]
    for owner, nbytes in last.owners.items():
        per_layer = (nbytes - first.owners.get(owner, 0)) / max(more - few, 1)
        ledger.moment = last.moment
        ledger.take(owner, int(nbytes + per_layer * (num_layers - more)))


def _trace(
    causal: Any, num_layers: int, *, batch: int, length: int, labels: int, chunk_rows: int
) -> Peak:
    """Return the peak of a step through the first layers, beside what is there all the time."""
    ledger = Ledger()
    body, vocabulary = _body(causal), causal.get_output_embeddings().weight.shape[0]
    counting = _Counting(ledger)
    with FakeTensorMode(), _shortened(causal, num_layers), _flash(causal), _faked(body) as tensors:
        counting.ignore(*tensors)
        with counting:
            ledger.moment = "forward"
            ids = torch.zeros(batch, length, dtype=torch.int64)
            hidden = body(input_ids=ids, use_cache=False)[0]
            ledger.moment = "the loss"
            selected = hidden.flatten(0, 1)[:labels].clone()
            del hidden
            grad = torch.empty_like(selected)
            counting.owner = LOGITS
            logits = selected.new_empty(min(chunk_rows, labels), vocabulary)
            counting.owner = ACTIVATIONS
            del logits
            ledger.moment = "backward"
            selected.backward(grad)
    return ledger.peak


def _body(causal: Any) -> Any:
    return getattr(causal, causal.base_model_prefix)


def _layers(causal: Any) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the body's decoder layers."""
    for name, child in _body(causal).named_children():
        if isinstance(child, nn.ModuleList):
            return name, child
    raise ConfigError(
        f"{type(causal).__name__} has no list of layers that memory could be planned for",
        hint="train without a plan: set memory: lean and watch the first step",
    )


@contextlib.contextmanager
def _shortened(causal: Any, num_layers: int) -> Iterator[None]:
    """Leave the model its first layers only."""
    name, layers = _layers(causal)
    setattr(_body(causal), name, nn.ModuleList(list(layers)[:num_layers]))
    try:
        yield
    finally:
        setattr(_body(causal), name, layers)


@contextlib.contextmanager
def _faked(body: nn.Module) -> Iterator[list[Tensor]]:
    """Put fake tensors on the CPU in the place of all parameters and buffers; yield them."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Any) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                empty.grad = torch.empty_like(empty) if tensor.requires_grad else None
            made[id(tensor)] = empty
        return made[id(tensor)]

    modules = list(body.modules())
    before = [(dict(module._parameters), dict(module._buffers)) for module in modules]
    try:
        for module, (parameters, buffers) in zip(modules, before, strict=True):
            module._parameters.update({name: fake(p) for name, p in parameters.items()})
            module._buffers.update({name: fake(b) for name, b in buffers.items()})
        yield [t for tensor in made.values() for t in (tensor, tensor.grad) if t is not None]
    finally:
        for module, (parameters, buffers) in zip(modules, before, strict=True):
            module._parameters.update(parameters)
            module._buffers.update(buffers)


@contextlib.contextmanager
def _flash(causal: Any) -> Iterator[None]:
    """Let attention that would run in fused kernels be counted as such."""
    before = causal.config._attn_implementation
    if before == "eager":
        yield
        return
    causal.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        causal.set_attn_implementation(before)
