import copy

import pytest
import torch

from halfbyte.adapters.identity import base_fingerprint, is_same_base, quantized_format
from halfbyte.adapters.inject import add_lora
from halfbyte.quant.linear import NF4Linear


def same(a, b):
    return is_same_base(base_fingerprint(a), base_fingerprint(b))


def test_one_base_is_itself_in_every_precision(load):
    models = [load("nf4"), load("bf16"), load("bf16").float()]
    assert all(same(a, b) for a in models for b in models)


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_another_base_of_the_same_shape_is_another(load, other_path, kind):
    assert not same(load(kind), load(kind, path=other_path))
    assert not same(load("nf4"), load("bf16", path=other_path))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"trainable_token_indices": [1, 2]},
        {"bias": "all"},
    ],
)
def test_adapters_do_not_count(load, input_ids, fields):
    base = load()
    before = base_fingerprint(base)
    model = add_lora(base, **fields)
    assert base_fingerprint(model) == before
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    model.train()(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    assert base_fingerprint(model) == before


def test_a_changed_norm_or_embedding_is_another_base(load):
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        changed = load("bf16")
        changed.get_parameter(name).data += 0.5
        assert not same(changed, load("bf16"))


def test_changed_codes_are_another_base(load):
    """A base that another adapter was merged into keeps its embedding and norms."""
    changed = load()
    layer = next(m for m in changed.modules() if isinstance(m, NF4Linear))
    layer.weight.data = layer.weight.data.flip(0)
    assert not same(changed, load())
    assert same(changed, load("bf16"))


def test_weights_that_are_not_at_hand_have_no_fingerprint(load):
    model = copy.deepcopy(load("bf16")).to("meta")
    assert base_fingerprint(model) is None


def test_what_bitsandbytes_settings_do_not_say_is_recorded(load):
    expected = {"block_size": 64, "dtype": "bfloat16"}
    assert quantized_format(load()) == quantized_format(add_lora(load())) == expected
    assert quantized_format(load("bf16")) is None
