import torch

from halfbyte.memory.usage import Usage


def test_a_cpu_counts_the_whole_process():
    before = Usage.measure(torch.device("cpu"))
    held = torch.ones(2**24)
    after = Usage.measure(torch.device("cpu"))
    assert after.host_bytes - before.host_bytes > held.nbytes // 2
    assert after.allocated_bytes == after.reserved_bytes == after.host_bytes <= after.peak_bytes
