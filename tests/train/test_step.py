"""One optimizer step: right gradients, however it is cut; nothing updated when it is not finite."""

import copy

import pytest
import torch
from torch import nn

from halfbyte.errors import TrainingError
from halfbyte.memory.activations import checkpoint_activations
from halfbyte.memory.pager import SLOTS
from halfbyte.memory.pages import Paging
from halfbyte.optim.adamw import AdamW
from halfbyte.train.loss import LanguageModel
from halfbyte.train.step import train_step


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def one_step(model, batches, *, step=0, lr=1e-3, max_grad_norm=1.0):
    optimizer = AdamW(trainable(model).items())
    result = train_step(
        LanguageModel.of(model),
        optimizer,
        batches,
        step=step,
        learning_rate=lr,
        max_grad_norm=max_grad_norm,
        seed=0,
    )
    gradients = {name: p.grad.clone() for name, p in trainable(model).items()}
    return result, gradients


def relative_error(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def test_loss_and_gradients_equal_transformers(make_lora, batch_of):
    model, batches = make_lora(), [batch_of([9, 5, 7], seed=0), batch_of([4, 12], seed=1)]
    theirs = copy.deepcopy(model)
    total = torch.tensor(float(sum(batch.num_supervised for batch in batches)))
    expected = 0.0
    for batch in batches:
        loss = theirs(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            num_items_in_batch=total,
            use_cache=False,
        ).loss
        loss.backward()
        expected += loss.item()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), float("inf"))

    result, gradients = one_step(model, batches)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert (result.supervised_tokens, result.tokens) == (7 + 3 + 5 + 2 + 10, 37)
    for name, parameter in trainable(theirs).items():
        assert relative_error(gradients[name], parameter.grad) < 1e-5, name


def test_accumulation_equals_one_batch_with_unequal_token_counts(make_lora, batch_of):
    lengths = [3, 20, 5, 9, 14, 4]
    whole = batch_of(lengths)
    width = whole.input_ids.shape[1]
    parts = []
    for i in range(0, 6, 2):  # 3 x 2 rows instead of 1 x 6
        rows = [
            t[i : i + 2]
            for t in (whole.input_ids, whole.labels, whole.position_ids, whole.attention_mask)
        ]
        parts.append(type(whole)(*rows, int((rows[1][:, 1:] != -100).sum()), int(rows[3].sum())))
    assert width == 20

    one, gradients = one_step(make_lora(), [whole])
    three, accumulated = one_step(make_lora(), parts)
    assert three.loss == pytest.approx(one.loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert relative_error(accumulated[name], gradient) < 2e-6, name


def test_packed_step_equals_padded_step(make_lora, batch_of):
    lengths = [3, 20, 5, 9]
    padded, expected = one_step(make_lora(), [batch_of(lengths)])
    packed, gradients = one_step(make_lora(), [batch_of(lengths, packed=True)])
    assert packed.loss == pytest.approx(padded.loss, rel=1e-6)
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) < 1e-5, name


def test_overfits_one_batch(make_lora, batch_of):
    # a head this large can express any token; at the usual 0.02 the loss has a floor
    model, batch = make_lora(initializer_range=0.2), batch_of([12, 12])
    optimizer, parts = AdamW(trainable(model).items()), LanguageModel.of(model)
    losses = [
        train_step(
            parts, optimizer, [batch], step=i, learning_rate=2e-2, max_grad_norm=1.0, seed=0
        ).loss
        for i in range(60)
    ]
    assert losses[0] > 4
    assert losses[-1] < 0.1


def test_clipping_bounds_what_the_update_sees(make_lora, batch_of):
    """A first Adam step is sign(g) whatever its length: look at the moments instead."""
    model = make_lora()
    optimizer = AdamW(trainable(model).items())
    result = train_step(
        LanguageModel.of(model),
        optimizer,
        [batch_of([9])],
        step=0,
        learning_rate=0.0,
        max_grad_norm=1e-3,
        seed=0,
    )
    moments = torch.cat(
        [t.flatten() for n, t in optimizer.state_dict().items() if n.startswith("exp_avg.")]
    )
    assert result.grad_norm > 1e-2
    assert moments.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - beta1) * clipped


def test_checkpointing_activations_changes_no_bit(make_lora, batch_of):
    plain = make_lora(lora_dropout=0.1)
    recomputing = make_lora(lora_dropout=0.1)
    checkpoint_activations(recomputing, {"use_reentrant": True})
    assert any(getattr(m, "gradient_checkpointing", False) for m in recomputing.modules())
    batches = [batch_of([9, 5, 7]), batch_of([4, 12], seed=1)]
    first, expected = one_step(plain, batches)
    second, gradients = one_step(recomputing, batches)
    assert first == second
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_dropout_depends_on_the_step_and_on_nothing_else(make_lora, batch_of):
    batches = [batch_of([9, 5, 7])]
    first, _ = one_step(make_lora(lora_dropout=0.5), batches, step=3)
    torch.rand(17)  # somebody else draws numbers
    again, _ = one_step(make_lora(lora_dropout=0.5), batches, step=3)
    other, _ = one_step(make_lora(lora_dropout=0.5), batches, step=4)
    assert first == again
    assert first.loss != other.loss


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_loss_is_caught_before_the_update(poison, make_lora, batch_of):
    model = make_lora()
    parts = LanguageModel.of(model)
    optimizer = AdamW(trainable(model).items())
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = poison
    good, bad = batch_of([9, 5]), batch_of([9, 5], seed=1)
    good.input_ids[good.input_ids == 50] = 51
    bad.input_ids[0, 3] = 50
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    with pytest.raises(
        TrainingError, match=r"step 8: the loss of micro-step 2 of 2 \(14 tokens\) is nan"
    ):
        train_step(
            parts, optimizer, [good, bad], step=7, learning_rate=1e-3, max_grad_norm=1.0, seed=0
        )
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())
    assert optimizer.steps_done == 0


def test_non_finite_gradient_is_caught_before_the_update(make_lora, batch_of):
    model = make_lora()
    parameter = next(iter(trainable(model).values()))
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = parameter.detach().clone()
    with pytest.raises(TrainingError, match="step 1: the gradient norm is"):
        one_step(model, [batch_of([9, 5])])
    assert torch.equal(parameter, before)


def test_step_without_supervised_tokens_is_finite(make_lora, batch_of):
    result, _ = one_step(make_lora(), [batch_of([4, 3], prompt=9)])
    assert (result.loss, result.grad_norm, result.supervised_tokens) == (0.0, 0.0, 0)


def test_state_on_the_host_begins_to_come_before_the_norm_is_known(
    make_lora, batch_of, fake_pool, monkeypatch
):
    models = make_lora(), make_lora()
    pool = fake_pool(10**6)
    optimizers = [
        AdamW(trainable(models[0]).items()),
        AdamW(trainable(models[1]).items(), placement="host", paging=Paging(2**12, pool=pool)),
    ]
    norm, seen = optimizers[1].grad_norm, []
    monkeypatch.setattr(optimizers[1], "grad_norm", lambda: seen.append(len(pool.moved)) or norm())
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            train_step(
                LanguageModel.of(model), optimizer, [batch_of([9, 5])],
                step=step, learning_rate=1e-2, max_grad_norm=1.0, seed=0,
            )  # fmt: skip
    assert seen == [SLOTS, len(pool.moved) // 2 + SLOTS]
    assert pool.moved.count("in") == pool.moved.count("out")
    first, second = (trainable(model) for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    optimizers[1].prefetch()
    assert pool.used > 0
    optimizers[1].zero_grad()  # as when the step before was left out
    assert pool.used == 0
