"""Looking a step ahead changes when the host works, and nothing else."""

import dataclasses

import pytest
import torch

from halfbyte.engine.body import FusedBody
from halfbyte.errors import DataError
from halfbyte.optim.adamw import AdamW
from halfbyte.train import loss
from halfbyte.train.ahead import Ahead
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_come_out(make_lora, steps, dtype):
    expected, losses = train(make_lora().to(dtype), steps.__getitem__)
    ahead = Ahead(steps.__getitem__, STEPS)
    found, found_losses = train(make_lora().to(dtype), None, ahead=ahead)
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
