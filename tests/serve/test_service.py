"""A service holds the model dense on a CPU, and gives it back as it was."""

import pytest
import torch

from halfbyte.errors import AdapterError, ConfigError
from halfbyte.models.load import load
from halfbyte.quant.linear import NF4Linear
from halfbyte.serve.engine import EngineConfig
from halfbyte.serve.service import open_service


def num_packed(model):
    return sum(isinstance(module, NF4Linear) for module in model.modules())


def test_open_and_close(tiny_base):
    model, tokenizer = load(tiny_base, dtype=torch.float32, device="cpu")
    before = num_packed(model)
    config = EngineConfig(max_batch_size=2)
    service = open_service(model, tokenizer, name="tiny", config=config)
    assert service.max_model_len == 256  # the model's positions
    assert service.cache_bytes == 2 * 2 * 2 * 2 * 256 * 16 * 4
    assert service.is_dense
    assert num_packed(model) == 0
    service.close(timeout=1)
    assert num_packed(model) == before
    assert not service.engine.is_alive


def test_what_does_not_fit_is_an_error_and_stops_the_engine(tiny_base, adapters):
    model, tokenizer = load(tiny_base, dtype=torch.float32, device="cpu")
    for length in (8, 257):
        with pytest.raises(ConfigError, match="max_model_len should be from 16 to"):
            open_service(model, tokenizer, name="tiny", max_model_len=length)
    with pytest.raises(AdapterError):
        open_service(model, tokenizer, name="tiny", adapters={"red": adapters["red"]})
