import threading

import pytest
import torch

from halfbyte.checkpoint import ahead
from halfbyte.checkpoint.ahead import ReadAhead
from halfbyte.checkpoint.reader import CheckpointReader
from halfbyte.checkpoint.writer import ShardedWriter
from halfbyte.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def reader(tmp_path):
    torch.manual_seed(0)
    with ShardedWriter(tmp_path, max_shard_bytes=3000) as writer:
        for layer in (0, 10, 2):
            writer.add(f"layers.{layer}.weight", torch.randn(20, 33).bfloat16())
        writer.add("scalar", torch.tensor(3.5))
        writer.add("empty", torch.empty(0, 4))
    return CheckpointReader(tmp_path)


def expected(reader):
    return {name: reader.tensor(name) for name in reader.names()}


def test_tensors_come_in_the_natural_order_and_whole(reader):
    with ReadAhead(reader, CPU) as tensors:
        taken = {name: tensor[...] for name, tensor in tensors.state_dict().items()}
    layers = [f"layers.{layer}.weight" for layer in (0, 2, 10)]
    assert [name for name in taken if name in layers] == layers
    for name, tensor in expected(reader).items():
        assert taken[name].dtype == tensor.dtype
        assert torch.equal(taken[name], tensor)


def test_any_order_is_served_and_few_tensors_are_held(reader):
    names = list(reversed(reader.names()))
    with ReadAhead(reader, CPU) as tensors:
        for name in [*names, *names]:
            assert torch.equal(tensors.take(name), reader.tensor(name))
            assert len(tensors._pending) <= 2
        with pytest.raises(CheckpointError, match="no tensor 'absent'"):
            tensors.take("absent")


def test_a_tensor_is_read_before_it_is_asked_for(reader, monkeypatch):
    read, second = [], threading.Event()

    def note(name, info):
        read.append(name)
        if len(read) == 2:
            second.set()
        return torch.empty(0)

    monkeypatch.setattr(ahead, "read_tensor", note)
    with ReadAhead(reader, CPU) as tensors:
        first, after = list(tensors.state_dict())[:2]
        tensors.take(first)
        assert second.wait(10)
    assert read == [first, after]


def test_a_file_that_ends_early_is_an_error_where_it_is_taken(reader):
    name = "layers.10.weight"
    info = reader.info(name)
    with info.file.open("r+b") as file:
        file.truncate(info.start + 5)
    with (
        ReadAhead(reader, CPU) as tensors,
        pytest.raises(CheckpointError, match=f"within '{name}'"),
    ):
        tensors.take(name)


def test_a_lane_brings_chunks_to_their_places(reader):
    lane = ahead._Lane(CPU, chunk_bytes=100)
    for name, tensor in expected(reader).items():
        target = torch.empty_like(tensor)
        lane.carry(name, reader.info(name), target)
        lane.finish()
        assert torch.equal(target, tensor)


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_whole_while_memory_is_used_again(reader, monkeypatch):
    monkeypatch.setattr(ahead, "_CHUNK_BYTES", 100)
    device = torch.device("cuda")
    with ReadAhead(reader, device) as tensors:
        for _ in range(20):
            for name, tensor in expected(reader).items():
                assert torch.equal(tensors.take(name).cpu(), tensor)
