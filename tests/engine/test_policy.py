from dataclasses import replace

from halfbyte.engine.block import BlockShape
from halfbyte.engine.policy import LayerBytes, choose, plan

SHAPE = BlockShape(32, 8, 128, 14336, "silu")


def test_bytes_of_llama_8b_for_one_token():
    sizes = LayerBytes.of(SHAPE, 4096, 1, 2)
    assert sizes == LayerBytes(
        input=2 * 4096, attention=2 * (4096 + 6144 + 4096), all=2 * (14336 + 4096 + 2 * 14336)
    )


def test_what_is_normed_is_saved_too():
    plain, normed = (
        LayerBytes.of(replace(SHAPE, has_head_norms=has, has_branch_norms=has), 4096, 1, 2)
        for has in (False, True)
    )
    assert normed.input == plain.input
    assert normed.attention - plain.attention == 2 * (40 * 128 + 4096)
    assert normed.all - plain.all == 2 * (40 * 128 + 2 * 4096)


def test_everything_is_kept_where_it_fits_and_only_inputs_where_nothing_does():
    sizes = LayerBytes(10, 30, 100)
    assert choose(4, sizes, 400) == ["all"] * 4
    assert choose(4, sizes, 0) == ["input"] * 4


def test_attention_comes_before_the_mlp_and_late_layers_before_early_ones():
    sizes = LayerBytes(10, 30, 100)
    assert choose(4, sizes, 90) == ["input", "input", "attention", "attention"]
    assert choose(4, sizes, 120 + 75) == ["attention", "attention", "attention", "all"]


def test_the_choice_never_exceeds_its_budget():
    sizes = LayerBytes(10, 30, 100)
    cost = {"input": 10, "attention": 30, "all": 100}
    for budget in range(40, 420, 7):
        assert sum(cost[level] for level in choose(4, sizes, budget)) <= budget


def test_fast_and_lean_keep_all_and_inputs_whatever_is_free():
    sizes = LayerBytes(10, 30, 100)
    assert plan("fast", 2, sizes, 50, 0).levels == ["all", "all"]
    assert plan("lean", 2, sizes, 50, 10**9).levels == ["input", "input"]


def test_what_activations_leave_free_is_for_dequantized_weights():
    sizes = LayerBytes(10, 30, 100)
    assert plan("auto", 2, sizes, 50, 149).num_staying == 0
    assert plan("auto", 2, sizes, 50, 250).num_staying == 1
    assert plan("auto", 2, sizes, 50, 10**6).num_staying == 2
    assert plan("fast", 2, sizes, 50, 0).num_staying == 0
    assert plan("lean", 2, sizes, 50, 10**6).num_staying == 0
