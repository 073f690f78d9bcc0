"""Pick the fastest implementation of a kernel, by name.

`kernels.x` holds the contract and the plain-torch reference; `kernels.x_triton` and `kernels.x_cpu`
may hold functions of the same names. `@accelerated` on the reference looks there first, by the
device of the first argument. The reference stays at `.__wrapped__`, for tests.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
_TWINS = {"cuda": "_triton", "cpu": "_cpu"}


def implementation(reference: Callable[P, R], device_type: str) -> Callable[P, R]:
    """Return the twin of `reference` for this kind of device, or `reference` itself."""
    module = reference.__module__ + _TWINS.get(device_type, "_none")
    if importlib.util.find_spec(module) is None:
        return reference
    twin = getattr(importlib.import_module(module), reference.__name__, reference)
    return cast(Callable[P, R], twin)


def accelerated(reference: Callable[P, R]) -> Callable[P, R]:
    """Call the fastest implementation there is for the device of the first argument, on it."""
    find = functools.cache(functools.partial(implementation, reference))

    @functools.wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        return run_on_its_gpu(find(first.device.type), *args, **kwargs)

    return call


def run_on_its_gpu(function: Callable[..., R], first: Any, *args: Any, **kwargs: Any) -> R:
    """Call `function` on the GPU that its first argument is on: Triton launches on the current."""
    device: torch.device = first.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return function(first, *args, **kwargs)
    with torch.cuda.device(device):
        return function(first, *args, **kwargs)
