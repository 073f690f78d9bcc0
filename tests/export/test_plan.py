"""A merged checkpoint's tensors: where each comes from, and what becomes of tied weights."""

import peft
import pytest

from halfbyte.errors import AdapterError
from halfbyte.export.base import BaseWeights
from halfbyte.export.plan import make_plan
from halfbyte.export.updates import LoraUpdate, RowsUpdate
from halfbyte.models.skeleton import read_skeleton

LORA = LoraUpdate("A", "B", 4, 1.0)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="session")
def tied(make_base):
    return read_skeleton(make_base(tie_word_embeddings=True))


@pytest.fixture(scope="session")
def untied(tiny_base):
    return read_skeleton(tiny_base)


def plan(skeleton, updates, **settings):
    config = peft.LoraConfig(target_modules=["q_proj"], **settings)
    made = make_plan(BaseWeights(skeleton).names, skeleton, updates, config)
    return made, {step.name: step for step in made.steps if step.updates}


def test_the_base_is_copied_in_order_with_its_updates(untied):
    name = "model.layers.1.mlp.up_proj.weight"
    made, changed = plan(untied, {name: [LORA]})
    assert [step.name for step in made.steps] == BaseWeights(untied).names
    assert list(changed) == [name]
    assert not made.unties


def test_untied_weights_change_one_by_one(untied):
    made, changed = plan(untied, {HEAD: [LORA]})
    assert list(changed) == [HEAD]
    assert not made.unties


@pytest.mark.parametrize(("changed_one", "other"), [(EMBED, HEAD), (HEAD, EMBED)])
def test_changing_one_of_a_pair_unties_it(tied, changed_one, other):
    made, changed = plan(tied, {changed_one: [LORA]})
    assert made.unties
    assert list(changed) == [changed_one]
    steps = {step.name: step for step in made.steps}
    assert steps[EMBED].source == steps[HEAD].source
    assert other in steps


def test_pairs_stay_tied_where_the_adapter_says_so(tied):
    made, changed = plan(tied, {EMBED: [LORA]}, ensure_weight_tying=True)
    assert not made.unties
    assert list(changed) == [EMBED]
    assert HEAD not in {step.name for step in made.steps}


def test_trained_rows_stay_shared(tied):
    made, changed = plan(tied, {EMBED: [RowsUpdate("rows", (1,))]})
    assert not made.unties
    assert list(changed) == [EMBED]


def test_an_update_of_nothing_is_refused_with_the_nearest_name(untied):
    with pytest.raises(AdapterError, match=r"upp_proj.*does not have .*up_proj"):
        plan(untied, {"model.layers.1.mlp.upp_proj.weight": [LORA]})


def test_tensors_in_pieces_are_refused(make_base, tmp_path):
    import torch
    import transformers

    config = transformers.Qwen2MoeConfig(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2,
        num_experts=2, vocab_size=50, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    skeleton = read_skeleton(tmp_path)
    assert skeleton.converted
    name = next(name for name in skeleton.model.state_dict() if "experts.down_proj" in name)
    with pytest.raises(AdapterError, match="several pieces"):
        plan(skeleton, {name: [LORA]})
