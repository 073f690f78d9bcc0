"""Settings out of range are refused; none is left to the model's own defaults."""

import pytest

from halfbyte.errors import ConfigError
from halfbyte.generate.sampling import Sampling


def test_zero_temperature_is_greedy_and_drops_sampling():
    config = Sampling(temperature=0, top_p=0.5).generation_config(
        stop_token_ids=[3], pad_token_id=0
    )
    assert config.do_sample is False
    assert config.eos_token_id == [3]


def test_sampling_settings_reach_transformers():
    config = Sampling(
        temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.2
    ).generation_config(stop_token_ids=[], pad_token_id=0)
    assert (config.temperature, config.top_p, config.top_k) == (0.5, 0.9, 7)
    assert config.repetition_penalty == 1.2
    assert config.eos_token_id is None


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
    ],
)
def test_values_out_of_range_are_errors(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Sampling(**setting)
