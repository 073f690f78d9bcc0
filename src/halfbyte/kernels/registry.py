"""Declare an op once, and find its fastest implementation by name.

`halfbyte.kernels.x` holds the contract and a plain-torch reference; `x_cpu` and `x_triton` may
hold functions of the same name, which serve CPU and CUDA tensors. Twins are imported on first use,
so that importing Halfbyte needs neither Triton nor a compiler.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from halfbyte.kernels.dispatch import run_on_its_gpu

_TWINS = {"CPU": "_cpu", "CUDA": "_triton"}


def register_op(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *, module: str
) -> None:
    """Register `halfbyte::<name>` with PyTorch.

    Args:
        schema: The op's name and signature, as in `torch.library.define`.
        reference: Plain-torch implementation; serves every device without a twin.
        fake: Shapes and dtypes only, for `torch.compile`.
        module: Name of the module with the contract; its twins are looked for beside it.
    """
    name = f"halfbyte::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "CompositeExplicitAutograd")(reference)
    torch.library.register_fake(name)(fake)
    for key, suffix in _TWINS.items():
        twin = module + suffix
        if importlib.util.find_spec(twin) is not None:
            torch.library.impl(name, key)(_lazy(twin, name.partition("::")[2], reference))


def _lazy(module: str, function: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that imports `module` when it is first called; it may lack `function`.

    It runs on the GPU of its first argument, a tensor.
    """

    @functools.cache
    def find() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function, reference)
        return found

    def call(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return run_on_its_gpu(find(), first, *args, **kwargs)

    return call
