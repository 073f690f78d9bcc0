"""Copies of the tiny base that a test may damage."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def base(tiny_base, tmp_path):
    """A folder of its own with the tiny base: bf16 Llama, untied, with its tokenizer."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    return folder


@pytest.fixture
def change_config():
    """Return a function that sets keys of a folder's config.json; None takes a key out."""

    def change(folder, **settings):
        path = folder / "config.json"
        config = json.loads(path.read_text()) | settings
        config = {key: value for key, value in config.items() if value is not None}
        path.write_text(json.dumps(config))
        return folder

    return change


@pytest.fixture
def change_tensors():
    """Return a function that hands a folder's tensors to a function and writes what it leaves."""

    def change(folder, function):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        function(tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    return change


@pytest.fixture
def tokens():
    return torch.arange(2, 34).view(2, 16)
