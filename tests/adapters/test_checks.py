import pytest
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from halfbyte.adapters.checks import check_settings, check_targets
from halfbyte.errors import AdapterError, ConfigError


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.c_attn = Conv1D(2, 2)
        self.embed = nn.Embedding(2, 2)


def config(**fields):
    return LoraConfig(**({"r": 4, "lora_alpha": 8} | fields))


@pytest.mark.parametrize(
    "fields", [{"lora_alpha": 0.5}, {"lora_dropout": 0}, {"alpha_pattern": {"x": 2.5}}]
)
def test_reasonable_settings_pass(fields):
    check_settings(config(**fields))


@pytest.mark.parametrize(
    "fields", [{"alpha_pattern": {"x": -1}}, {"lora_alpha": True}, {"lora_dropout": "much"}]
)
def test_settings_out_of_range(fields):
    with pytest.raises(ConfigError, match=next(iter(fields)).split("_pattern")[0] + "|'x'"):
        check_settings(config(**fields))


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], ["embed"], r"first\.0", ["first.0"]])
def test_targets_that_are_there(targets):
    check_targets(Tiny(), config(target_modules=targets))


def test_excluded_target_matches_nothing():
    with pytest.raises(AdapterError, match="'c_attn' matches no layer"):
        check_targets(Tiny(), config(target_modules=["c_attn"], exclude_modules=["c_attn"]))


def test_layer_that_cannot_be_adapted():
    with pytest.raises(AdapterError, match=r"'first\.1', a ReLU"):
        check_targets(Tiny(), config(target_modules=["first.1"]))


def test_a_message_names_what_is_there_and_what_is_near():
    with pytest.raises(AdapterError) as caught:
        check_targets(Tiny(), config(target_modules=["c_atn"]))
    assert "its linear layers are: 0, c_attn" in caught.value.message
    assert caught.value.hint == "did you mean 'c_attn'?"
