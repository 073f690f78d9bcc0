"""The same bits from run to run: only kernels that add in a fixed order, or an error."""

import contextlib
import os
from collections.abc import Iterator

import torch

_CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when its first handle is made


@contextlib.contextmanager
def determinism(*, enabled: bool) -> Iterator[None]:
    """While entered and `enabled`, torch refuses kernels that are not deterministic."""
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault(_CUBLAS_VARIABLE, ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=before)
        torch.backends.cudnn.benchmark = benchmark
