"""Copies keep what was, whatever happens to the tensors afterwards."""

import pytest
import torch

from halfbyte.memory.host_copy import HostBuffers


def test_copies_do_not_follow_their_tensors():
    tensor = torch.arange(6.0).view(2, 3)
    copy = HostBuffers().copy({"a": tensor, "turned": tensor.T, "step": torch.tensor(3)})
    tensor.zero_()
    found = copy.wait()
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["turned"].is_contiguous()
    assert found["step"] == 3


def test_memory_is_used_again_and_follows_another_shape():
    buffers = HostBuffers()
    first = buffers.copy({"a": torch.ones(4)}).wait()["a"]
    again = buffers.copy({"a": torch.zeros(4)}).wait()["a"]
    assert first.data_ptr() == again.data_ptr()
    assert buffers.copy({"a": torch.ones(2, 2)}).wait()["a"].shape == (2, 2)


@pytest.mark.gpu
def test_copies_from_a_gpu_do_not_wait_and_do_not_follow():
    tensor = torch.ones(1 << 24, device="cuda")
    copy = HostBuffers().copy({"a": tensor})
    tensor.zero_()  # in line behind the copy
    found = copy.wait()["a"]
    assert found.is_pinned()
    assert bool((found == 1).all())
