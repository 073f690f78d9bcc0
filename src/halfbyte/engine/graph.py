"""The layers' forward and backward as two CUDA graphs, for steps that the host would hold up.

A step of an 8B model launches some 3,000 kernels. With few tokens the GPU is done with them before
the host has launched them; replaying a recorded graph costs the host nothing. One pair of graphs
serves one number of tokens. The backward graph adds to the parameters' `.grad` in place, so those
must stay where they are, as those of a flat optimizer do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfbyte.engine.attention import Layout

# Above this many tokens the GPU is slower than the host, and graphs would only hold memory.
MAX_TOKENS = 4096
_MAX_GRAPHS = 32
# Packed documents that the bounds of a graph have room for.
_MAX_DOCUMENTS = 256

Run = Callable[[Tensor, Tensor, Tensor, Layout, Tensor | None], Tensor]


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
        run: The layers: hidden states, cos, sin, layout and dropout seed to hidden states.
        parameters: What the backward accumulates gradients of.
    """

    run: Run
    parameters: Sequence[Tensor]
    _seen: set[tuple[int, int, bool, bool]] = field(default_factory=set)
    _recorded: dict[tuple[int, int, bool, bool], _Recorded] = field(default_factory=dict)
    _pool: Any = None

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, seed: Tensor | None
    ) -> Tensor:
        """Return what `run` returns, by a graph where there is one or where one is worth it."""
        bounds = layout.cu_seqlens
        key = (x.shape[0], layout.batch, bounds is None, seed is None)
        if not self._is_possible(x, bounds):
            return self.run(x, cos, sin, layout, seed)
        if key not in self._recorded:
            if key not in self._seen or len(self._recorded) == _MAX_GRAPHS:
                self._seen.add(key)
                return self.run(x, cos, sin, layout, seed)
            self._recorded[key] = self._record(x, cos, sin, layout, seed)
        recorded = self._recorded[key]
        sources = [x, cos, sin]
        if seed is not None:
            sources.append(seed)
        if bounds is not None:
            recorded.inputs[-1].fill_(x.shape[0])
            sources.append(bounds)
        for target, source in zip(recorded.inputs, sources, strict=True):
            target[: source.shape[0]].copy_(source, non_blocking=True)
        # Any parameter will do to make the output part of the autograd graph.
        return _Replay.apply(recorded, self.parameters[0])

    def forget(self) -> None:
        """Drop all graphs; sizes are recorded again when they come up twice more."""
        self._seen.clear()
        self._recorded.clear()

    def _is_possible(self, x: Tensor, bounds: Tensor | None) -> bool:
        return (
            x.is_cuda
            and x.shape[0] <= MAX_TOKENS
            and torch.is_grad_enabled()
            and not x.requires_grad
            and (bounds is None or bounds.numel() <= _MAX_DOCUMENTS)
            and all(p.grad is not None for p in self.parameters)
        )

    def _record(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, seed: Tensor | None
    ) -> _Recorded:
        inputs = [x.detach().clone(), cos.clone(), sin.clone()]
        static_seed = None
        if seed is not None:
            static_seed = seed.clone()
            inputs.append(static_seed)
        bounds = None
        if layout.cu_seqlens is not None:
            # Bounds beyond the last document are empty documents at the end.
            bounds = torch.full((_MAX_DOCUMENTS,), x.shape[0], dtype=torch.int32, device=x.device)
            inputs.append(bounds)
        static = Layout(layout.batch, layout.length, bounds, x.shape[0])
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            output = self.run(inputs[0], inputs[1], inputs[2], static, static_seed)
        grad_output = torch.zeros_like(output)
        with torch.cuda.graph(backward, pool=self._pool):
            torch.autograd.backward(output, grad_output, inputs=list(self.parameters))
        return _Recorded(tuple(inputs), output.detach(), grad_output, forward, backward)


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
