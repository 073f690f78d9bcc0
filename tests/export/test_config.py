"""Settings of a merge say what is wrong with them."""

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.export.config import MergeConfig, parse_size


def test_sizes_are_read_as_people_write_them():
    assert parse_size("5GB") == 5_000_000_000
    assert parse_size("1.5 MiB") == 1_572_864
    for wrong in ("5", "GB", "0GB", "5 parsecs"):
        with pytest.raises(ConfigError, match="expected a size"):
            parse_size(wrong)


def test_settings_are_checked():
    assert MergeConfig(dtype="float16").torch_dtype is MergeConfig(dtype=torch.float16).torch_dtype
    assert MergeConfig(max_shard_size="5GB").max_shard_bytes == 5_000_000_000
    for wrong in ({"onto": "both"}, {"dtype": "int8"}, {"dtype": torch.int8}):
        name = next(iter(wrong))
        with pytest.raises(ConfigError, match=f"{name} should be"):
            MergeConfig(**wrong)
