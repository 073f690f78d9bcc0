from dataclasses import replace

import pytest

from halfbyte.engine.block import BlockShape
from halfbyte.engine.policy import LayerBytes, choose, least_bytes, plan, tiles, working_bytes

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


@pytest.mark.parametrize(("below", "enough"), [("input", 60), ("attention", 180)])
def test_inputs_go_to_the_host_where_a_level_does_not_fit_and_lift_late_layers(below, enough):
    sizes = LayerBytes(10, 30, 100)
    cost = {"offload": 0, "input": 10, "attention": 30, "all": 100}
    assert choose(6, sizes, 0, offload_below=below, host_layers=6) == ["offload"] * 5 + ["input"]
    assert choose(6, sizes, 59, offload_below=below, host_layers=6) == ["offload"] * 5 + [
        "attention"
    ]
    assert choose(6, sizes, enough, offload_below=below, host_layers=6) == choose(6, sizes, enough)
    for budget in range(least_bytes(6, sizes, 6), enough):
        levels = choose(6, sizes, budget, offload_below=below, host_layers=6)
        assert sum(cost[level] for level in levels) + 2 * 10 <= budget
    assert choose(1, sizes, 0, offload_below=below, host_layers=6) == ["input"]


def test_a_host_that_holds_some_inputs_takes_those():
    sizes = LayerBytes(10, 30, 100)
    assert choose(6, sizes, 0, host_layers=4) == ["offload"] * 4 + ["input"] * 2
    assert choose(6, sizes, 59, host_layers=4) == ["offload"] * 4 + ["input"] * 2
    assert choose(6, sizes, 60, host_layers=4) == choose(6, sizes, 60)  # all fit on the device
    wide = LayerBytes(10, 15, 100)
    assert choose(6, wide, 55, host_layers=4) == ["offload"] * 4 + ["attention"] * 2
    assert choose(6, wide, 48, host_layers=4) == ["offload"] * 4 + ["input", "attention"]
    cost = {"offload": 0, "input": 10, "attention": 15}
    for host_layers in range(7):
        least = least_bytes(6, wide, host_layers)
        for budget in range(least, 60):
            levels = choose(6, wide, budget, host_layers=host_layers)
            assert levels.count("offload") <= host_layers
            staged = 20 if "offload" in levels else 0
            assert sum(cost[level] for level in levels) + staged <= budget
    assert [least_bytes(6, wide, some) for some in (0, 1, 4, 5, 6)] == [60, 60, 40, 30, 30]


def test_a_number_of_bytes_is_spent_on_more_layers_than_auto_spends_it_on():
    sizes = LayerBytes(10, 30, 100)
    levels = [plan(memory, 32, sizes, 50, 640, host_layers=32).levels for memory in ("auto", 640)]
    assert [some.count("attention") for some in levels] == [16, 20]
    assert [some.count("offload") for some in levels] == [0, 12]


def test_lean_keeps_the_least_that_there_is():
    sizes = LayerBytes(10, 30, 100)
    assert plan("lean", 3, sizes, 50, 10**9, host_layers=3).levels == ["offload"] * 2 + ["input"]
    assert plan("auto", 3, sizes, 50, 10**9, host_layers=3).levels == ["all"] * 3
    assert least_bytes(80, sizes, 80) == 30
    assert least_bytes(80, sizes, 0) == 800


def test_tiles_are_smaller_than_the_whole_and_take_less():
    assert tiles(1000) == [0]
    assert tiles(9000) == [0, 4096, 2048, 1024, 512]
    assert tiles(9000, max_tile=2048) == [2048, 1024, 512]
    assert tiles(4000, max_tile=8192) == [0, 1024, 512]
    sizes = [working_bytes(SHAPE, 4096, 9000, 2, tile) for tile in tiles(9000)]
    assert sizes == sorted(sizes, reverse=True)
