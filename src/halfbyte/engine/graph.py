"""The layers' forward and backward as two CUDA graphs, for steps that the host would hold up.

A step of an 8B model launches some 3,000 kernels. With few tokens the GPU is done with them before
the host has launched them; replaying a recorded graph costs the host nothing. One pair of graphs
serves one number of tokens. The backward graph adds to the parameters' `.grad` in place, so those
must stay where they are, as those of a flat optimizer do.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfbyte.engine.attention import Layout

_log = logging.getLogger(__name__)

# Above so many tokens the gaps between kernels do not count, and graphs would only hold memory.
MAX_TOKENS = 8192
# Above so many, what a recording holds is large: it is made where the card has room for a step of
# another size beside it, that is where this share of its memory was enough so far.
LARGE_TOKENS, LARGE_SHARE = 4096, 0.6
_MAX_GRAPHS = 32
# What a graph for packed documents has room for. Attention launches programs for every document
# of the greatest length, there or not: with much more room than is needed, that takes its time.
_DOCUMENTS = (16, 64, 256)
_LENGTHS = (256, 1024, 4096)
# Other threads, a checkpoint's writer above all, may allocate while this one records.
_MODE = "thread_local"
# Gradients that are added in one launch: about those of a layer.
_ADDED_AT_ONCE = 16

Run = Callable[[Tensor, Tensor, Tensor, Layout, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Size:
    """What one pair of graphs serves: tokens, rows, room for packed documents, dropout or not."""

    tokens: int
    batch: int
    documents: int | None
    longest: int
    has_seed: bool

    @classmethod
    def of(cls, num_tokens: int, layout: Layout, seed: Tensor | None) -> "_Size | None":
        """Return the size that serves a batch, or None where it has too many documents."""
        documents, longest = None, layout.max_length
        if layout.cu_seqlens is not None:
            count = layout.cu_seqlens.numel() - 1
            documents = next((room for room in _DOCUMENTS if count <= room), None)
            longest = next((room for room in _LENGTHS if longest <= room), num_tokens)
            if documents is None:
                return None
        return cls(num_tokens, layout.batch, documents, min(longest, num_tokens), seed is not None)


@dataclass
class _Recorded:
    """One pair of graphs, and the memory that their inputs and outputs keep."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    grad_output: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


@dataclass
class Graphs:
    """Graphs by size, recorded when a size comes up for the second time.

    Args:
        parameters: What the backward accumulates gradients of.
        is_thrifty: Memory is not to be spent on large graphs, however much there is.
    """

    parameters: Sequence[Tensor]
    is_thrifty: bool = False
    _seen: set[_Size] = field(default_factory=set)
    _recorded: dict[_Size, _Recorded] = field(default_factory=dict)
    _pool: Any = None
    is_stopped: bool = False

    def __call__(
        self, run: Run, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, seed: Tensor | None
    ) -> Tensor:
        """Return what `run` returns, by a graph where there is one or where one is worth it.

        `run` takes hidden states, cos, sin, layout and dropout seed to hidden states. It is not
        held: whoever owns these graphs would then live as long as the garbage collector sleeps.
        """
        size = _Size.of(x.shape[0], layout, seed)
        if size is None or not self._is_possible(x, size):
            return run(x, cos, sin, layout, seed)
        if size not in self._recorded:
            if size not in self._seen or len(self._recorded) == _MAX_GRAPHS:
                self._seen.add(size)
                return run(x, cos, sin, layout, seed)
            reason, stream = None, torch.cuda.current_stream(x.device)
            try:
                self._recorded[size] = self._record(run, x, cos, sin, size, seed)
            except RuntimeError as error:
                # Above all for want of memory: a recording holds its own. A step needs none.
                reason = str(error).partition("\n")[0]
            if reason is not None:
                # Out here the traceback is gone, and with it what the recording had made.
                _log.warning("no CUDA graphs from here on: %s", reason)
                self._give_up(stream)
                return run(x, cos, sin, layout, seed)
        recorded = self._recorded[size]
        sources = [x, cos, sin]
        if seed is not None:
            sources.append(seed)
        if layout.cu_seqlens is not None:
            recorded.inputs[-1].fill_(x.shape[0])
            sources.append(layout.cu_seqlens)
        for target, source in zip(recorded.inputs, sources, strict=True):
            target[: source.shape[0]].copy_(source, non_blocking=True)
        # Any parameter will do to make the output part of the autograd graph.
        return _Replay.apply(recorded, self.parameters[0])

    def forget(self) -> None:
        """Drop all graphs; sizes are recorded again when they come up twice more."""
        self._seen.clear()
        self._recorded.clear()
        self._pool = None  # it is gone with its last graph

    def stop(self) -> bool:
        """Drop all graphs and record no more; return whether there were any."""
        had_any = bool(self._recorded)
        self.forget()
        self.is_stopped = True
        return had_any

    def _give_up(self, stream: torch.cuda.Stream) -> None:
        """Drop all graphs, and put right what a recording that broke off leaves behind.

        Where CUDA refuses to end it, torch stays on its stream, goes on allocating to its pool and
        keeps random numbers recording.
        """
        torch.cuda.set_stream(stream)
        index, pool = stream.device.index, self._pool
        self.stop()
        with contextlib.suppress(RuntimeError):  # raised where the recording did end
            torch._C._cuda_endAllocateToPool(index, pool)  # type: ignore[attr-defined]
            torch._C._cuda_releasePool(index, pool)  # type: ignore[attr-defined]
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        torch.cuda.empty_cache()

    def _is_possible(self, x: Tensor, size: _Size) -> bool:
        return (
            x.is_cuda
            and not self.is_stopped
            and (size in self._recorded or x.shape[0] <= self._max_tokens(x.device))
            and torch.is_grad_enabled()
            and not x.requires_grad
            and bool(self.parameters)
            and all(p.grad is not None for p in self.parameters)
        )

    def _max_tokens(self, device: torch.device) -> int:
        return MAX_TOKENS if not self.is_thrifty and _has_room(device) else LARGE_TOKENS

    def _record(
        self, run: Run, x: Tensor, cos: Tensor, sin: Tensor, size: _Size, seed: Tensor | None
    ) -> _Recorded:
        inputs = [x.detach().clone(), cos.clone(), sin.clone()]
        static_seed = None
        if seed is not None:
            static_seed = seed.clone()
            inputs.append(static_seed)
        bounds = None
        if size.documents is not None:
            # Bounds beyond the last document are empty documents at the end.
            shape = (size.documents + 1,)
            bounds = torch.full(shape, size.tokens, dtype=torch.int32, device=x.device)
            inputs.append(bounds)
        static = Layout(size.batch, size.tokens // size.batch, bounds, size.longest)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool, capture_error_mode=_MODE):
            output = run(inputs[0], inputs[1], inputs[2], static, static_seed)
        grad_output = torch.zeros_like(output)
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode=_MODE):
            accumulate(output, self.parameters, grad_output)
        return _Recorded(tuple(inputs), output.detach(), grad_output, forward, backward)


def _has_room(device: torch.device) -> bool:
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.max_memory_allocated(device) <= LARGE_SHARE * total


def accumulate(output: Tensor, parameters: Sequence[Tensor], grad_output: Tensor) -> None:
    """Add the gradients of `output` to the parameters' `.grad`, a few as soon as they are there.

    Not by `backward`: its accumulation may belong to a step outside, on another stream. And not
    all at the end: together they are as large as all adapters, and memory is recorded too.
    """
    stream = torch.cuda.current_stream(output.device) if output.is_cuda else None
    nothing = output.new_zeros((), dtype=parameters[0].dtype)
    waiting: list[tuple[Tensor, Tensor]] = []

    def flush() -> None:
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            sums, grads = zip(*waiting, strict=True)
            torch._foreach_add_(sums, grads)
        waiting.clear()

    def adder(parameter: Tensor) -> Callable[[Tensor], Tensor]:
        def add(grad: Tensor) -> Tensor:
            assert parameter.grad is not None
            waiting.append((parameter.grad, grad))
            if len(waiting) == _ADDED_AT_ONCE:
                flush()
            return nothing.to(grad.dtype).expand(grad.shape)  # what autograd keeps instead

        return add

    hooks = [parameter.register_hook(adder(parameter)) for parameter in parameters]
    try:
        torch.autograd.grad(output, list(parameters), grad_output)
        if waiting:
            flush()
    finally:
        for hook in hooks:
            hook.remove()


class _Replay(torch.autograd.Function):
    """Replay the forward graph; in the backward, the backward graph."""

    @staticmethod
    def forward(ctx: Any, recorded: _Recorded, _: Tensor) -> Tensor:
        ctx.recorded = recorded
        recorded.forward.replay()
        return recorded.output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        recorded = ctx.recorded
        recorded.grad_output.copy_(grads[0])
        recorded.backward.replay()
        return None, None
