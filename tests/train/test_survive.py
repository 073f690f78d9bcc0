"""Memory runs out somewhere in a step: the step is done all the same, and does the same."""

import dataclasses
import gc

import pytest
import torch

from halfbyte.engine import body as body_module
from halfbyte.engine import policy
from halfbyte.engine.body import FusedBody
from halfbyte.engine.final_norm import final_norm
from halfbyte.engine.layer import FusedLayer
from halfbyte.errors import DeviceError
from halfbyte.memory.pages import Paging
from halfbyte.optim import adamw
from halfbyte.optim.adamw import AdamW
from halfbyte.train import loss as loss_module
from halfbyte.train.loss import LanguageModel
from halfbyte.train.survive import Survivor

STEPS = 3
PAGE_BYTES = 4 * 256 * 8
PLACES = (
    "embedding",
    "first layer forward",
    "last layer forward",
    "norm",
    "loss",
    "last layer backward",
    "first layer backward",
    "gradient norm",
    "first page",
    "third page",
)


class Fault:
    """Raises at one place of the second step, as often as told."""

    def __init__(self, place, times):
        self.place, self.times, self.is_armed = place, times, False

    def __call__(self, place):
        if self.is_armed and place == self.place and self.times:
            self.times -= 1
            raise torch.OutOfMemoryError(f"injected at {place}")


def inject(fault, monkeypatch, model, optimizer):
    """Put the fault's places into the model, whatever body it is run by."""
    run, norm, head, step = (
        FusedLayer.run, optimizer.grad_norm, loss_module.linear_cross_entropy, adamw.adamw_step_,
    )  # fmt: skip
    base = model.model.get_base_model()
    base.model.embed_tokens.register_forward_hook(lambda *_: fault("embedding"))
    pages = []

    def layer_run(self, x, *args):
        which = "first" if self.layer is base.model.layers[0] else "last"
        fault(f"{which} layer forward")
        y = run(self, x, *args)
        if y.requires_grad:
            y.register_hook(lambda _: fault(f"{which} layer backward"))
        return y

    def cross_entropy(*args, **kwargs):
        fault("loss")
        return head(*args, **kwargs)

    def grad_norm():
        fault("gradient norm")
        return norm()

    def update(*args, **kwargs):
        pages.append(1)
        fault({1: "first page", 3: "third page"}.get(len(pages), ""))
        step(*args, **kwargs)

    def normalize(*args):
        fault("norm")
        return final_norm(*args)

    monkeypatch.setattr(body_module, "final_norm", normalize)
    monkeypatch.setattr(FusedLayer, "run", layer_run)
    monkeypatch.setattr(loss_module, "linear_cross_entropy", cross_entropy)
    monkeypatch.setattr(optimizer, "grad_norm", grad_norm)
    monkeypatch.setattr(adamw, "adamw_step_", update)
    return pages


def explain(shortage):
    return DeviceError(f"it does not fit: {shortage.reason}")


def survivor(model, fake_pool, told=None, *, is_fused=True):
    parts = LanguageModel.of(model)
    if is_fused:
        parts = dataclasses.replace(parts, body=FusedBody(parts.body, memory="fast"))
    optimizer = AdamW(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        placement="auto",
        paging=Paging(PAGE_BYTES, 4 * PAGE_BYTES, fake_pool(10**7)),
    )
    return Survivor(
        parts, optimizer, tell=(told if told is not None else []).append, explain=explain
    )


def do_steps(survivor, batches, fault=None, pages=None):
    results = []
    for step in range(STEPS):
        if fault is not None:
            fault.is_armed = step == 1
            pages.clear()
        results.append(
            survivor.step(batches, step=step, learning_rate=1e-2, max_grad_norm=1.0, seed=5)
        )
    return results


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def live_bytes():
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Leave what libraries made out of collections, which would take a second each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def batches(batch_of):
    return [batch_of([9, 5, 7]), batch_of([4, 12], seed=1)]


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_anywhere_changes_no_bit(place, make_lora, batches, fake_pool, monkeypatch):
    model = make_lora(lora_dropout=0.2)
    undisturbed = survivor(model, fake_pool)
    expected = do_steps(undisturbed, batches)
    right = weights(model)
    undisturbed.optimizer.release()
    del model, undisturbed

    told, fault = [], Fault(place, times=1)
    model = make_lora(lora_dropout=0.2)
    steps = survivor(model, fake_pool, told)
    pages = inject(fault, monkeypatch, steps.model, steps.optimizer)
    before = live_bytes()
    assert do_steps(steps, batches, fault, pages) == expected
    assert fault.times == 0
    assert all(torch.equal(value, right[name]) for name, value in weights(model).items())
    assert [event.step for event in told] == [2]
    assert "optimizer state to the host" in told[0].measures[0]
    grown = live_bytes() - before
    assert abs(grown) <= 3 * PAGE_BYTES  # results, and pages made anew: no activations


@pytest.mark.parametrize("place", ["last layer forward", "loss", "first layer backward"])
@pytest.mark.parametrize("packed", [False, True])
def test_when_pages_and_recomputing_do_not_help_batches_are_cut(
    place, packed, make_lora, batch_of, fake_pool, monkeypatch
):
    batches = [batch_of([9, 5, 7], packed=packed), batch_of([4, 12], seed=1, packed=packed)]
    model = make_lora(lora_dropout=0.2)
    expected = do_steps(survivor(model, fake_pool), batches)
    right = weights(model)

    told, fault = [], Fault(place, times=4)
    model = make_lora(lora_dropout=0.2)
    steps = survivor(model, fake_pool, told)
    pages = inject(fault, monkeypatch, steps.model, steps.optimizer)
    results = do_steps(steps, batches, fault, pages)
    (event,) = told
    assert [measure.split()[0] for measure in event.measures] == [
        "moved", "computes", "cuts", "cuts",
    ]  # fmt: skip
    assert steps.max_tokens == event.max_tokens < 21
    assert steps.model.body.memory == "lean"
    for result, wanted in zip(results, expected, strict=True):
        assert result.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)
        assert (result.tokens, result.supervised_tokens) == (
            wanted.tokens, wanted.supervised_tokens,
        )  # fmt: skip
    # Adam's first steps are signs: an element whose gradient is nearly 0 may go either way.
    for name, value in weights(model).items():
        off = (value - right[name]).abs() > 1e-4
        assert off.float().mean() < 0.01, name


def test_tiles_come_before_cuts(make_lora, batches, fake_pool, monkeypatch):
    expected = do_steps(survivor(make_lora(lora_dropout=0.2), fake_pool), batches)
    monkeypatch.setattr(policy, "TILES", (10, 6))
    told, fault = [], Fault("loss", times=4)
    steps = survivor(make_lora(lora_dropout=0.2), fake_pool, told)
    pages = inject(fault, monkeypatch, steps.model, steps.optimizer)
    results = do_steps(steps, batches, fault, pages)
    assert list(told[0].measures[1:]) == [
        "computes every layer twice",
        "runs MLPs over 10 tokens at a time",
        "runs MLPs over 6 tokens at a time",
    ]
    assert steps.max_tokens is None
    assert steps.model.body.max_tile == 6
    for result, wanted in zip(results, expected, strict=True):
        assert result.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)


def test_layers_of_transformers_are_checkpointed_and_then_cut(
    make_lora, batches, fake_pool, monkeypatch
):
    model = make_lora()
    expected = do_steps(survivor(model, fake_pool, is_fused=False), batches)
    right = weights(model)

    told, fault = [], Fault("loss", times=3)
    model = make_lora()
    steps = survivor(model, fake_pool, told, is_fused=False)
    results = do_steps(
        steps, batches, fault, inject(fault, monkeypatch, steps.model, steps.optimizer)
    )
    assert [m.split()[0] for m in told[0].measures] == ["moved", "computes", "cuts"]
    assert [r.loss for r in results] == pytest.approx([r.loss for r in expected], rel=1e-5)
    close = [torch.allclose(v, right[n], atol=1e-4) for n, v in weights(model).items()]
    assert sum(close) >= 0.9 * len(close)


def test_what_cannot_be_done_at_all_is_explained(make_lora, batches, fake_pool, monkeypatch):
    model = make_lora()
    steps = survivor(model, fake_pool)
    fault = Fault("last layer forward", times=10**6)
    pages = inject(fault, monkeypatch, steps.model, steps.optimizer)
    with pytest.raises(DeviceError, match="it does not fit: injected at last layer forward"):
        do_steps(steps, batches, fault, pages)


def test_other_errors_are_not_swallowed(make_lora, batches, fake_pool, monkeypatch):
    steps = survivor(make_lora(), fake_pool)

    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loss_module, "linear_cross_entropy", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        do_steps(steps, batches)


def test_a_setting_that_worked_is_kept(make_lora, batches, fake_pool, monkeypatch):
    told, fault = [], Fault("loss", times=3)
    steps = survivor(make_lora(), fake_pool, told)
    pages = inject(fault, monkeypatch, steps.model, steps.optimizer)
    do_steps(steps, batches, fault, pages)
    do_steps(steps, batches)
    assert len(told) == 1
    assert steps.optimizer.resident_bytes == 0
    assert steps.max_tokens is not None


def test_pages_that_came_back_leave_before_anything_else_is_given_up(
    make_lora, batches, fake_pool, monkeypatch
):
    told, fault = [], Fault("loss", times=1)
    steps = survivor(make_lora(), fake_pool, told)
    steps.optimizer.evict()
    for _ in range(8):
        steps.optimizer.step(0.0)
    assert steps.optimizer.has_come_back
    monkeypatch.setattr(FusedBody, "stop_recording", lambda _: True)
    pages = inject(fault, monkeypatch, steps.model, steps.optimizer)
    do_steps(steps, batches, fault, pages)
    (event,) = told
    assert [measure.split()[0] for measure in event.measures] == ["moved"]
