"""A small checkpoint, whole and in shards."""

import json

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(16, 8).bfloat16(),
        "layer.weight": torch.randn(8, 8).half(),
        "layer.bias": torch.randn(8),
        "codes": torch.randint(0, 256, (5, 1), dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
    }


@pytest.fixture
def single(tmp_path, tensors):
    """A folder with model.safetensors."""
    folder = tmp_path / "single"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path, tensors):
    """A folder with two shards and their index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = list(tensors)
    shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    write_index(folder, {name: shard for shard, held in shards.items() for name in held})
    return folder


def write_index(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def change_index():
    """Return a function that changes the weight map of a folder's index."""

    def change(folder, function):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        write_index(folder, function(index["weight_map"]))

    return change
