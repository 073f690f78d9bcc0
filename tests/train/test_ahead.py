"""Looking a step ahead changes when the host works, and nothing else."""

import contextlib
import dataclasses

import pytest
import torch

from halfbyte.engine.body import FusedBody
from halfbyte.errors import DataError
from halfbyte.optim.adamw import AdamW
from halfbyte.train import ahead as ahead_module
from halfbyte.train import loss
from halfbyte.train import step as step_module
from halfbyte.train.ahead import Ahead
from halfbyte.train.gradients import Gradients, NonFiniteError
from halfbyte.train.loss import LanguageModel
from halfbyte.train.step import train_step

STEPS = 3
SETTINGS = {"learning_rate": 1e-3, "max_grad_norm": 1.0, "seed": 5}


@pytest.fixture
def steps(batch_of):
    """Batches of three steps: two whole rows, short ones to be packed, one row."""
    return [
        [batch_of([8, 8], seed=0)],
        [batch_of([5, 9], seed=1), batch_of([3, 4], seed=2)],
        [batch_of([7], seed=3)],
    ]


def train(model, load, *, ahead=None):
    """Return the parameters and the losses of a few steps."""
    parts = LanguageModel.of(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer, losses = AdamW(named), []
    for step in range(STEPS):
        batches = load(step) if ahead is None else ahead.batches(step)
        result = train_step(parts, optimizer, batches, step=step, ahead=ahead, **SETTINGS)
        losses.append(result.loss)
    return {name: p.detach().clone() for name, p in named}, losses


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_come_out(make_lora, steps, dtype, begins):
    expected, losses = train(make_lora(lora_dropout=0.2).to(dtype), steps.__getitem__)
    ahead = Ahead(steps.__getitem__, STEPS, begins=lambda _: begins)
    found, found_losses = train(make_lora(lora_dropout=0.2).to(dtype), None, ahead=ahead)
    assert found_losses == losses
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_step_is_loaded_once_during_the_one_before(make_lora, steps):
    loaded = []

    def load(step):
        loaded.append(step)
        return steps[step]

    ahead = Ahead(load, STEPS)
    parts = LanguageModel.of(make_lora())
    optimizer = AdamW([(n, p) for n, p in parts.model.named_parameters() if p.requires_grad])
    for step in range(STEPS):
        batches = ahead.batches(step)
        assert loaded == list(range(step + 1))
        train_step(parts, optimizer, batches, step=step, ahead=ahead, **SETTINGS)
        assert loaded == list(range(min(step + 2, STEPS)))


def test_angles_are_made_ahead_where_they_are_small(make_lora, batch_of, monkeypatch):
    parts = LanguageModel.of(make_lora())
    parts = dataclasses.replace(parts, body=FusedBody(parts.body))
    batch = batch_of([8, 8])
    expected, packed = parts.loss_sum(batch), parts.prepare([batch])
    monkeypatch.setattr(parts.body._angles, "_rotary", None)  # asked for no more
    assert torch.equal(parts.loss_sum(batch, packed=packed), expected)
    monkeypatch.setattr(loss, "MAX_TOKENS", 15)
    assert parts.prepare([batch]).angles is None


def test_what_cannot_be_loaded_fails_in_its_own_step(make_lora, steps):
    def load(step):
        if step == 1:
            raise DataError("row 7 is gone")
        return steps[step]

    model = make_lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(DataError, match="row 7"):
        train(model, None, ahead=Ahead(load, STEPS))
    after = dict(model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_a_step_is_cut_again_where_the_limit_or_the_model_changed(make_lora, steps):
    parts = LanguageModel.of(make_lora())
    ahead = Ahead(steps.__getitem__, STEPS)
    ahead.look(parts, 1, None)
    batches = ahead.batches(1)
    as_looked = ahead.micro_steps(parts, batches, None)
    assert as_looked is ahead.micro_steps(parts, batches, None)
    assert max(piece.num_tokens for piece in ahead.micro_steps(parts, batches, 9)) <= 9
    other = LanguageModel.of(make_lora())
    assert ahead.micro_steps(other, batches, None) is not as_looked
    assert ahead.micro_steps(parts, steps[0], None)[0].batches[0] is steps[0][0]


@pytest.fixture
def parts_and_optimizer(make_lora):
    parts = LanguageModel.of(make_lora(lora_dropout=0.2))
    return parts, AdamW([(n, p) for n, p in parts.model.named_parameters() if p.requires_grad])


def watched(monkeypatch):
    """Return a list that gets what `compute_gradients` queues: the steps."""
    queued, seed = [], step_module.seed_micro_step
    monkeypatch.setattr(
        step_module, "seed_micro_step", lambda *args: (queued.append(args[1]), seed(*args))
    )
    return queued


def test_a_step_is_queued_before_the_one_before_is_waited_for(
    parts_and_optimizer, steps, monkeypatch
):
    queued, order = watched(monkeypatch), []
    result = Gradients.result

    def waits(self):
        order.append((self.step, len(queued)))
        return result(self)

    monkeypatch.setattr(Gradients, "result", waits)
    ahead = Ahead([steps[0], steps[2], steps[2]].__getitem__, STEPS, begins=lambda _: True)
    for step in range(STEPS):
        train_step(*parts_and_optimizer, ahead.batches(step), step=step, ahead=ahead, **SETTINGS)
    assert queued == [0, 1, 2]  # each once
    assert order == [(0, 2), (1, 3), (2, 3)]


def test_long_steps_and_changed_models_are_not_queued_before(
    parts_and_optimizer, steps, monkeypatch
):
    parts, optimizer = parts_and_optimizer
    queued = watched(monkeypatch)
    monkeypatch.setattr(ahead_module, "MAX_TOKENS", 15)
    ahead = Ahead([steps[0], steps[0], steps[2]].__getitem__, STEPS, begins=lambda _: True)
    train_step(parts, optimizer, ahead.batches(0), step=0, ahead=ahead, **SETTINGS)
    assert queued == [0]
    train_step(parts, optimizer, ahead.batches(1), step=1, ahead=ahead, **SETTINGS)
    assert queued == [0, 1, 2]
    other = dataclasses.replace(parts)  # as after memory ran out
    train_step(other, optimizer, ahead.batches(2), step=2, ahead=ahead, **SETTINGS)
    assert queued == [0, 1, 2, 2]


def test_a_step_behind_one_that_is_not_finite_is_the_right_one(make_lora, steps):
    """It was queued before anybody knew, from parameters that have not changed."""
    good, bad = steps[2][0], steps[0][0]
    good.input_ids[good.input_ids == 3] = 4
    bad.input_ids[0, 0] = 3

    def run(*, begins):
        model = make_lora(lora_dropout=0.2)
        model.get_input_embeddings().weight.data[3] = torch.nan
        parts = LanguageModel.of(model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = AdamW(named)
        ahead = Ahead([[good], [bad], [good]].__getitem__, STEPS, begins=lambda _: begins)
        for step in range(STEPS):
            batches = ahead.batches(step)
            with pytest.raises(NonFiniteError) if step == 1 else contextlib.nullcontext():
                train_step(parts, optimizer, batches, step=step, ahead=ahead, **SETTINGS)
        return {name: p.detach().clone() for name, p in named}, optimizer.steps_done

    (expected, count), (found, found_count) = run(begins=False), run(begins=True)
    assert count == found_count == 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_step_that_could_not_be_queued_early_is_done_in_its_turn(make_lora, steps, monkeypatch):
    expected, losses = train(make_lora(), steps.__getitem__)
    norm, calls = AdamW.grad_norm, []

    def fails_once(self):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("for step 1, while step 0 runs")
        return norm(self)

    monkeypatch.setattr(AdamW, "grad_norm", fails_once)
    ahead = Ahead(steps.__getitem__, STEPS, begins=lambda _: True)
    found, found_losses = train(make_lora(), None, ahead=ahead)
    assert len(calls) == STEPS + 1
    assert found_losses == losses
    assert all(torch.equal(found[name], expected[name]) for name in expected)
