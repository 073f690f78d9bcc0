import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from halfbyte.checkpoint.pages import release_pages


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("tensor", [torch.arange(10**6), torch.zeros(3), torch.empty(0)])
def test_values_stay(tensor):
    before = tensor.clone()
    release_pages(tensor)
    assert torch.equal(tensor, before)


def test_takes_what_has_no_pages():
    release_pages(torch.zeros(10**6, device="meta"))
    release_pages(torch.zeros(1000, 1000).T)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_tensor_leaves_memory_and_can_be_read_again(tmp_path):
    path = tmp_path / "large.safetensors"
    save_file({"large": torch.ones(2**24)}, path)
    with safe_open(path, framework="pt") as file:
        tensor = file.get_slice("large")[...]
        assert tensor.sum() == 2**24
        before = resident_bytes()
        release_pages(tensor)
        assert resident_bytes() < before - 2**25
        assert tensor.sum() == 2**24
