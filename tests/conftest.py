"""What all tests share: where Triton kernels run, and quick, quiet libraries."""

import os

# Before anything imports a library that reads these.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def half_dtype() -> torch.dtype:
    """The 16-bit dtype to test Triton kernels in: its interpreter truncates bf16 instead of
    rounding it, so float16 stands in for it where there is no GPU.
    """
    return torch.bfloat16 if torch.cuda.is_available() else torch.float16
