"""Each kind of trouble is seen where it is; a healthy run is left in peace."""

import random
from pathlib import Path

import pytest

from halfbyte.train.adapter_norms import AdapterNorms
from halfbyte.train.events import TrainingStarted
from halfbyte.train.troubles import (
    History,
    dead_adapters,
    exploding_loss,
    flat_loss,
    high_norm,
    large_updates,
    loss_spikes,
    one_source,
    small_updates,
    vanishing_gradient,
)

RATE = 2e-4


def history(losses, norms=None):
    norms = norms or [0.5] * len(losses)
    made = History()
    for loss, norm in zip(losses, norms, strict=True):
        made.add(loss, norm, RATE)
    return made


def falling(count, noise=0.1, seed=0):
    """Losses of a run that learns: from 1.5 to 1.1, with noise."""
    dice = random.Random(seed)
    return [1.1 + 0.4 * 0.97**i + dice.gauss(0, noise) for i in range(count)]


def test_a_healthy_run_is_left_in_peace():
    for seed in range(20):
        for noise in (0.02, 0.1, 0.3):
            dice = random.Random(seed)
            run = History()
            for loss in falling(300, noise, seed):
                run.add(loss, 0.5 * 1.5 ** dice.gauss(0, 1), RATE)
                assert high_norm(run, RATE) is None
                assert exploding_loss(run, RATE) is None
                assert loss_spikes(run, RATE) is None
                assert flat_loss(run, RATE) is None
                assert vanishing_gradient(run, 10_000, 1e-8) is None


def test_large_gradients():
    assert high_norm(history([1.0] * 12, [1.0] * 10 + [50, 11]), RATE) is None
    trouble = high_norm(history([1.0] * 12, [1.0] * 9 + [50, 11, 12]), RATE)
    assert "over 10 in 3 of the last 10 steps (50 at most)" in trouble.what
    assert "learning_rate 1.0e-04" in trouble.advice


def test_exploding_loss():
    trouble = exploding_loss(history([2.0, 1.5, 1.2] * 10 + [6.0] * 5), RATE)
    assert "rose to 6, from 1.4" in trouble.what


def test_loss_spikes_need_a_large_gradient_too():
    losses, norms = falling(60), [0.5] * 60
    for step in (30, 40, 50):
        losses[step] = 9.0
    assert loss_spikes(history(losses, norms), RATE) is None  # a hard row
    for step in (30, 40, 50):
        norms[step] = 5.0
    trouble = loss_spikes(history(losses, norms), RATE)
    assert "3 times" in trouble.what
    assert "bf16" in trouble.cause


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_flat_loss(noise):
    dice = random.Random(1)
    losses = [1.3 + dice.gauss(0, noise) for _ in range(400)]
    found = [flat_loss(history(losses[:end]), RATE) for end in range(60, 401)]
    assert any(found)
    assert "has not fallen" in next(filter(None, found)).what


def test_vanishing_gradient():
    trouble = vanishing_gradient(history([0.0] * 10, [1e-7] * 10), 10_000, 1e-8)
    assert "below 1.0e-06 in the last 10 steps" in trouble.what
    assert vanishing_gradient(history([0.0] * 10, [1e-7] * 9 + [1e-5]), 10_000, 1e-8) is None


def norms_of(**rms_b):
    return {name: AdapterNorms(0.01, value) for name, value in rms_b.items()}


def test_dead_adapters():
    first = norms_of(a=0.0, b=0.0, c=0.5)
    now = norms_of(a=1e-3, b=0.0, c=0.4)
    assert dead_adapters(history([1.0] * 19), first, now) is None  # too early
    trouble = dead_adapters(history([1.0] * 20), first, now)
    assert "1 of 3 adapters have not moved in 20 steps, such as b" in trouble.what
    assert "experts" in trouble.cause
    all_dead = dead_adapters(history([1.0] * 20), first, first)
    assert "no gradient reaches the adapters" in all_dead.cause


def test_steps_without_a_learning_rate_move_nothing_and_that_is_no_trouble():
    warming = history([1.0] * 30)
    warming.rates = [0.0] * 30
    assert dead_adapters(warming, norms_of(a=0.0), norms_of(a=0.0)) is None
    assert small_updates(warming, norms_of(a=0.0), norms_of(a=1e-9)) is None


def test_small_updates():
    run = history([1.0] * 20)
    assert small_updates(run, norms_of(a=0.0, b=0.0), norms_of(a=1e-3, b=1e-9)) is None
    trouble = small_updates(run, norms_of(a=0.0, b=0.0), norms_of(a=1e-9, b=1e-9))
    assert "2 of 2 adapters is still below 2.0e-06" in trouble.what


def test_learning_rate_that_is_large_beside_the_weights():
    assert large_updates(history([1.0]), norms_of(a=0.0), RATE) is None
    run = history([1.0])
    run.rates = [1e-2]
    trouble = large_updates(run, norms_of(a=0.0), 1e-2)
    assert "A of a by 100% of its size" in trouble.what
    assert "learning_rate 1.0e-03" in trouble.advice


def started(sources, first_step=0):
    train_part = type("Split", (), {"sources": sources})()
    summary = type("Summary", (), {"train": train_part})()
    return TrainingStarted(Path("out"), first_step, 10, 5, 10, 0, 1, 2, summary, {})


def test_one_source_dominates():
    assert one_source(started({})) is None
    assert one_source(started({"a.jsonl": 10})) is None
    assert one_source(started({"a.jsonl": 60, "b.jsonl": 40})) is None
    trouble = one_source(started({"a.jsonl": 96, "b.jsonl": 4}))
    assert "a.jsonl has 96% of the learned tokens of 2 files" in trouble.what
