"""Peaks: those measured on an H100, and how they move with the settings."""

import itertools
from dataclasses import replace

import pytest

from halfbyte.plan.predict import Setting

GIB = 2**30
# benchmarks/results/h100/2026-11-22.json, Llama-3-8B shape, rank 16; unpaged state on the card.
MEASURED = [(4, 2048, "lean", 9.33), (1, 8192, "lean", 9.33)]


@pytest.mark.parametrize(("rows", "length", "memory", "peak"), MEASURED)
def test_peak_is_what_a_gpu_measured(llama_planner, rows, length, memory, peak):
    found = llama_planner.predict(Setting(rows=rows, length=length, memory=memory))
    assert found.peak.nbytes / GIB == pytest.approx(peak, rel=0.03)
    assert sum(found.peak.owners.values()) == found.peak.nbytes


def test_more_memory_keeps_more(llama_planner):
    peaks = [
        llama_planner.predict(Setting(length=8192, total_bytes=size * GIB))
        for size in (12, 16, 24, 48)
    ]
    assert all(a.peak.nbytes < b.peak.nbytes for a, b in itertools.pairwise(peaks))
    assert all(p.fits for p in peaks)
    assert peaks[0].kept != peaks[-1].kept


def test_paged_state_leaves_when_the_card_is_short(llama_planner):
    setting = Setting(length=2048, memory="lean")
    whole = llama_planner.predict(setting)
    assert whole.paged_bytes == 0
    short = int(whole.peak.nbytes * 1.03 + GIB // 2) - 100 * 2**20
    away = llama_planner.predict(replace(setting, total_bytes=short))
    assert away.paged_bytes == 320 * 2**20
    assert away.fits
    stuck = llama_planner.predict(replace(setting, total_bytes=short, is_paged=False))
    assert not stuck.fits


def test_layers_of_transformers_are_counted(gemma_planner):
    assert "Gemma" in gemma_planner.why_unfused
    short = gemma_planner.predict(Setting(length=512))
    long = gemma_planner.predict(Setting(length=1024))
    twice = gemma_planner.predict(Setting(length=1024, is_checkpointed=True))
    stays = sum(short.persistent.values())
    assert (long.peak.nbytes - stays) / (short.peak.nbytes - stays) == pytest.approx(2, rel=0.1)
    assert twice.peak.nbytes < long.peak.nbytes


def test_the_model_is_left_as_it_was(gemma_planner):
    before = [id(p) for p in gemma_planner.causal.parameters()]
    gemma_planner.predict(Setting(length=256, is_checkpointed=True))
    assert [id(p) for p in gemma_planner.causal.parameters()] == before
    assert len(gemma_planner.body.layers) == 8
    assert not any(
        getattr(m, "gradient_checkpointing", False) for m in gemma_planner.causal.modules()
    )
