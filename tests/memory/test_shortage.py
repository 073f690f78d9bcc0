"""What counts as out of memory, and what does not."""

import pytest
import torch

from halfbyte.memory.shortage import Shortage, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_memory_errors_are_known(error):
    assert is_out_of_memory(error)


def test_an_error_that_came_from_a_memory_error_is_one():
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("while recording a graph")
    assert is_out_of_memory(error)


def test_other_errors_are_not():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_real_shortage_of_the_cpu_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    shortage = Shortage.measure(torch.device("cpu"), caught.value)
    assert "allocate" in shortage.reason
    assert not shortage.is_fragmented


def test_much_cached_memory_means_fragments():
    device = torch.device("cpu")
    whole = Shortage(device, "", allocated_bytes=90, cached_bytes=5)
    pieces = Shortage(device, "", allocated_bytes=60, cached_bytes=35)
    assert (whole.is_fragmented, pieces.is_fragmented) == (False, True)
