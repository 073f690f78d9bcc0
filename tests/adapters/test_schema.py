import json
import time
from pathlib import Path

import peft
import pytest

from halfbyte.adapters.checks import check_settings
from halfbyte.adapters.schema import check_config, check_identity
from halfbyte.errors import AdapterError

PATH = Path("adapter_config.json")
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": UNSLOTH},
        {"target_modules": r"^(?!.*visual).*layers\.\d+\.(q|v)_proj"},
        {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v": 8}},
        {"use_rslora": True, "lora_dropout": 0.1, "init_lora_weights": "pissa_niter_4"},
        {"trainable_token_indices": [1, 2], "modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers", "target_modules": ["q_proj"]},
    ],
)
def test_what_peft_writes_passes(settings):
    config = peft.LoraConfig(**settings).to_dict()
    content = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    check_config(json.loads(json.dumps(content)), PATH)
    check_settings(peft.LoraConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": "16"}, "r: input should be a valid integer"),
        ({"r": 10**12}, "r: input should be less than"),
        ({"r": 0}, "r: input should be greater than"),
        ({"r": True}, "r: "),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern"),
        ({"target_modules": 7}, "target_modules"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"bias": "some"}, "bias"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
    ],
)
def test_settings_of_another_kind_are_named(settings, message):
    with pytest.raises(AdapterError, match=message):
        check_config(settings, PATH)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(.|.)*b",
        "(a|a){2,}b",
        r"(a+\\)+b",
        "(?x)(a+) +b",
        "(?P<n>a)",
        ".*" * 7,
        "a" * 5000,
    ],
)
@pytest.mark.parametrize("place", ["target_modules", "rank_pattern", "layers_pattern"])
def test_patterns_that_may_never_end_are_refused(place, pattern):
    value = {pattern: 4} if place == "rank_pattern" else pattern
    started = time.monotonic()
    with pytest.raises(AdapterError, match="a pattern"):
        check_config({place: value}, PATH)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "identity",
    [
        {"base": "meta-llama/Meta-Llama-3-8B"},
        {"base": {"fingerprint": {"kept": 7}}},
        {"base": {"fingerprint": {"quantization": "nf4"}}},
        {"base": {"fingerprint": {"quantization": "nf4-17-torch.bfloat16"}}},
        {"quantization": []},
        {"version": 2},
    ],
)
def test_an_identity_that_halfbyte_did_not_write(identity):
    with pytest.raises(AdapterError, match="settings that do not fit"):
        check_identity(identity, Path("halfbyte.json"))


def test_an_identity_that_halfbyte_wrote():
    fingerprint = {"kept": "ab", "quantized": "cd", "quantization": "nf4-64-torch.bfloat16"}
    base = {"name_or_path": None, "fingerprint": fingerprint}
    check_identity({"version": 1, "base": base, "quantization": None, "packages": {}}, PATH)
