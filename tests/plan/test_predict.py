"""Peaks: those measured on an H100, and how they move with the settings."""

import itertools
from dataclasses import replace

import pytest

from halfbyte.engine.policy import TILES
from halfbyte.errors import ConfigError
from halfbyte.plan.predict import Setting

GIB = 2**30
# benchmarks/results/h100/2026-11-22.json, Llama-3-8B shape, rank 16; unpaged state and all layers'
# inputs on the card.
MEASURED = [(1, 1024, 6.67), (2, 1024, 7.13), (4, 2048, 9.24), (1, 16384, 12.25)]
# benchmarks/results/h100/2026-11-22-long.json, rank 32, on a card held to so many GiB and a host
# with so many: then the gradient of attention is the peak.
MEASURED_LONG = [(24, 125, 78496, 13.35), (80, 123, 342784, 43.01)]


@pytest.mark.parametrize(("rows", "length", "peak"), MEASURED)
def test_peak_is_what_a_gpu_measured(llama_planner, rows, length, peak):
    setting = Setting(rows=rows, length=length, memory="lean", is_paged=False, host_bytes=0)
    found = llama_planner.predict(setting)
    assert found.kept == {"input": 32}
    assert found.peak.nbytes / GIB == pytest.approx(peak, rel=0.03)
    assert sum(found.peak.owners.values()) == found.peak.nbytes


@pytest.mark.parametrize(("card", "host", "length", "peak"), MEASURED_LONG)
def test_peak_of_a_long_sequence_is_what_a_gpu_measured(llama_planner_32, card, host, length, peak):
    setting = Setting(length=length, memory="lean", total_bytes=card * GIB, host_bytes=host * GIB)
    found = llama_planner_32.predict(setting)
    assert found.tile == 8192
    assert found.peak.nbytes / GIB == pytest.approx(peak, rel=0.005)


def test_lean_moves_inputs_and_state_to_the_host(llama_planner):
    setting = Setting(rows=4, length=2048, memory="lean")
    found = llama_planner.predict(setting)
    assert found.kept == {"offload": 31, "input": 1}
    assert found.offloaded_bytes == 31 * 8192 * 4096 * 2
    assert found.paged_bytes == 320 * 2**20
    some = llama_planner.predict(replace(setting, host_bytes=GIB))
    assert some.kept == {"offload": 9, "input": 23}  # a gibibyte, less what others may want of it
    stays = llama_planner.predict(replace(setting, host_bytes=0))
    assert stays.offloaded_bytes == 0
    # All but the last input and those at work and on its way are elsewhere.
    assert (stays.peak.nbytes - found.peak.nbytes) / (29 * 8192 * 4096 * 2) == pytest.approx(1, 0.1)


def test_long_sequences_are_taken_in_tiles(llama_planner):
    setting = Setting(length=131072, memory="lean", total_bytes=24 * GIB)
    found = llama_planner.predict(setting)
    assert found.fits
    assert found.tile in TILES
    assert llama_planner.predict(replace(setting, total_bytes=None)).tile == 0


def test_more_memory_keeps_more(llama_planner):
    peaks = [
        llama_planner.predict(Setting(length=8192, total_bytes=size * GIB))
        for size in (12, 16, 24, 48)
    ]
    assert all(a.peak.nbytes < b.peak.nbytes for a, b in itertools.pairwise(peaks))
    assert all(p.fits for p in peaks)
    assert peaks[0].kept != peaks[-1].kept


def test_paged_state_leaves_when_the_card_is_short(llama_planner):
    setting = Setting(length=2048, memory=2**27)
    whole = llama_planner.predict(setting)
    assert whole.paged_bytes == 0
    short = int(whole.peak.nbytes * 1.03 + GIB // 2) - 100 * 2**20
    away = llama_planner.predict(replace(setting, total_bytes=short))
    assert away.paged_bytes == 320 * 2**20
    assert away.fits
    stuck = llama_planner.predict(replace(setting, total_bytes=short, is_paged=False))
    assert not stuck.fits


def test_eight_bits_take_two_matrices_a_weight_and_their_scales(llama_planner):
    setting = Setting(rows=4, length=2048, total_bytes=80 * GIB)
    exact, found = (
        llama_planner.predict(replace(setting, compute=compute)) for compute in ("bf16", "fp8")
    )
    assert found.kept == exact.kept == {"all": 32, "weights": 32}
    # Of an 8B: 6.5e9 weights in two orientations, with borders, LoRA, and a scale a row.
    weights = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    staying = found.peak.owners["dequantized weights that stay"]
    assert 1 < staying / (2 * weights) < 1.04
    rows = 32 * (4096 + 6144 + 4096 + 4096 + 4096 + 28672 + 14336 + 4096)
    assert found.persistent["scales of rows in eight bits"] == 4 * rows
    assert exact.persistent["scales of rows in eight bits"] == 0
    lean = llama_planner.predict(replace(setting, compute="fp8", memory="lean"))
    assert lean.peak.owners["activations in eight bits"] == 8192 * (2 * 14336 + 128 + 4)
    assert lean.peak.owners["dequantize workspace"] < 130 * 2**20


def test_eight_bits_are_for_fused_models(unfused_planner):
    with pytest.raises(ConfigError, match=r"compute: fp8 needs a model that runs fused.*Olmo2"):
        unfused_planner.predict(Setting(compute="fp8"))


def test_layers_of_transformers_are_counted(unfused_planner):
    assert "Olmo2" in unfused_planner.why_unfused
    short = unfused_planner.predict(Setting(length=512))
    long = unfused_planner.predict(Setting(length=1024))
    twice = unfused_planner.predict(Setting(length=1024, is_checkpointed=True))
    stays = sum(short.persistent.values())
    assert (long.peak.nbytes - stays) / (short.peak.nbytes - stays) == pytest.approx(2, rel=0.1)
    assert twice.peak.nbytes < long.peak.nbytes


def test_the_model_is_left_as_it_was(unfused_planner):
    before = [id(p) for p in unfused_planner.causal.parameters()]
    unfused_planner.predict(Setting(length=256, is_checkpointed=True))
    assert [id(p) for p in unfused_planner.causal.parameters()] == before
    assert len(unfused_planner.body.layers) == 8
    assert not any(
        getattr(m, "gradient_checkpointing", False) for m in unfused_planner.causal.modules()
    )
