"""The update is torch's AdamW, clipping included; its state survives a round trip."""

import copy

import bitsandbytes
import pytest
import torch
from torch import nn

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.memory.pages import Paging
from halfbyte.optim import adamw
from halfbyte.optim.adamw import AdamW


class Toy(nn.Module):
    """A bias, a norm and two matrices, one of them small."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(40, 70)
        self.norm = nn.LayerNorm(70)
        self.second = nn.Linear(70, 5, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.second(self.norm(self.first(x)).tanh())


def inputs(steps):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 40, generator=generator) * 3 for _ in range(steps)]


def peer_groups(model, weight_decay):
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_equals_torch_adamw_with_clipping(max_norm):
    ours, theirs = Toy(), Toy()
    optimizer = AdamW(ours.named_parameters(), lr=1e-2, weight_decay=0.1)
    peer = torch.optim.AdamW(peer_groups(theirs, 0.1), lr=1e-2)
    for x in inputs(20):
        optimizer.zero_grad()
        ours(x).square().sum().backward()
        norm = optimizer.grad_norm().item()
        optimizer.step(grad_scale=min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0)

        peer.zero_grad()
        theirs(x).square().sum().backward()
        total = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
        peer.step()
        assert norm == pytest.approx(total.item(), rel=1e-5)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6, msg=name)


def test_8bit_follows_bitsandbytes():
    torch.manual_seed(0)
    ours = nn.Linear(512, 64, bias=False)
    theirs = copy.deepcopy(ours)
    optimizer = AdamW(ours.named_parameters(), lr=1e-2, weight_decay=0.1, state_bits=8)
    peer = bitsandbytes.optim.AdamW8bit(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        x = torch.randn(8, 512)
        for model, zero in ((ours, optimizer.zero_grad), (theirs, peer.zero_grad)):
            zero()
            model(x).square().sum().backward()
        optimizer.step()
        peer.step()
    moved = (ours.weight - copy.deepcopy(theirs.weight)).abs()
    assert moved.mean() < 1e-4  # of a path of 10 steps of 1e-2
    assert moved.max() < 2e-2


@pytest.mark.parametrize("state_bits", [32, 8])
def test_an_update_that_should_not_be_is_taken_back(state_bits):
    model = Toy()
    optimizer = AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, state_bits=state_bits)
    first, second = inputs(2)
    model(first).square().sum().backward()
    optimizer.step()
    before = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    model(second).square().sum().backward()
    optimizer.step(grad_scale=torch.tensor(float("nan")))
    optimizer.take_back()
    after = (optimizer.state_dict(), model.state_dict())
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(value, new[name]) for name, value in old.items())


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_continues_bit_for_bit(state_bits, dtype):
    def run(model, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            model(x.to(dtype)).square().sum().backward()
            optimizer.step(1e-2)

    whole = Toy(dtype)
    optimizer = AdamW(whole.named_parameters(), state_bits=state_bits)
    run(whole, optimizer, inputs(6)[:3])
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    run(whole, optimizer, inputs(6)[3:])

    resumed = Toy(dtype)
    resumed.load_state_dict(weights)
    optimizer = AdamW(resumed.named_parameters(), state_bits=state_bits)
    optimizer.load_state_dict(saved)
    run(resumed, optimizer, inputs(6)[3:])
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


def test_bf16_parameters_do_not_lose_small_updates():
    weight = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
    optimizer = AdamW([("weight", weight)], lr=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(
        0.99, abs=2e-3
    )  # 1e-4 alone vanishes next to 1 in bf16


def test_biases_and_norms_are_not_decayed():
    model = Toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model.named_parameters(), lr=0.1, weight_decay=0.5)
    optimizer.step()  # zero gradients: only decay moves anything
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_state_of_other_parameters_is_refused():
    state = AdamW(Toy().named_parameters()).state_dict()
    with pytest.raises(CheckpointError, match=r"missing .*exp_avg.weight"):
        AdamW(nn.Linear(4, 4).named_parameters()).load_state_dict(state)
    state["exp_avg.second.weight"] = torch.zeros(5, 71)
    with pytest.raises(CheckpointError, match=r"expected torch.float32 \(5, 70\), got .*\(5, 71\)"):
        AdamW(Toy().named_parameters()).load_state_dict(state)


def test_nothing_to_train_says_to_add_adapters():
    model = Toy().requires_grad_(False)
    with pytest.raises(ConfigError, match="hint: add adapters first"):
        AdamW(model.named_parameters())


def test_wrong_number_of_bits_is_refused():
    with pytest.raises(ConfigError, match="32 or 8, got 4"):
        AdamW(Toy().named_parameters(), state_bits=4)


PAGE_BYTES = 2 * 256 * 8  # two blocks of 32-bit state


def trained(model, steps=20, **options):
    optimizer = AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, **options)
    for x in inputs(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step(grad_scale=0.5)
    return optimizer


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("resident", [0, 4 * PAGE_BYTES, None])
def test_paged_equals_unpaged_bit_for_bit(state_bits, resident, fake_pool):
    whole, cut = Toy(), Toy()
    pool = fake_pool(6 * PAGE_BYTES)
    unpaged = trained(whole, state_bits=state_bits)
    paged = trained(
        cut, state_bits=state_bits, placement="auto", paging=Paging(PAGE_BYTES, resident, pool)
    )
    assert paged.host_bytes > 0 or state_bits == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    states = unpaged.state_dict(), paged.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_paged_8bit_follows_bitsandbytes_paged_8bit(fake_pool):
    torch.manual_seed(0)
    ours = nn.Linear(512, 64, bias=False)
    theirs = copy.deepcopy(ours)
    paging = Paging(PAGE_BYTES, pool=fake_pool(2 * PAGE_BYTES))
    optimizer = AdamW(
        ours.named_parameters(), lr=1e-2, state_bits=8, placement="host", paging=paging
    )
    # On a CPU bitsandbytes has no unified memory to page; its values are those of the unpaged one.
    peer = bitsandbytes.optim.AdamW8bit(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(10):
        x = torch.randn(8, 512)
        for model, zero in ((ours, optimizer.zero_grad), (theirs, peer.zero_grad)):
            zero()
            model(x).square().sum().backward()
        optimizer.step()
        peer.step()
    assert (ours.weight - theirs.weight).abs().mean() < 1e-4  # of a path of 10 steps of 1e-2


@pytest.mark.parametrize("state_bits", [32, 8])
def test_state_moves_between_paged_and_unpaged(state_bits, fake_pool):
    whole = Toy()
    saved = trained(whole, state_bits=state_bits).state_dict()
    other = AdamW(
        Toy().named_parameters(),
        state_bits=state_bits,
        placement="auto",
        paging=Paging(PAGE_BYTES, PAGE_BYTES, fake_pool(10 * PAGE_BYTES)),
    )
    other.load_state_dict({name: tensor.clone() for name, tensor in saved.items()})
    assert other.resident_bytes <= PAGE_BYTES
    again = other.state_dict()
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    assert other.steps_done == 20


def test_eviction_between_steps_changes_no_bit(fake_pool):
    whole, cut = Toy(), Toy()
    trained(whole, steps=6)
    optimizer = AdamW(
        cut.named_parameters(),
        lr=1e-2,
        weight_decay=0.1,
        placement="auto",
        paging=Paging(PAGE_BYTES, None, fake_pool(10**6)),
    )
    freed = []
    for x in inputs(6):
        optimizer.zero_grad()
        cut(x).square().sum().backward()
        freed.append(optimizer.evict(PAGE_BYTES))
        optimizer.step(grad_scale=0.5)
    assert freed[0] == optimizer.host_bytes  # all at once, and it is away since
    assert not any(freed[1:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    assert AdamW(Toy().named_parameters()).evict() == 0


def test_an_update_that_ran_out_of_memory_is_finished_by_the_next_call(fake_pool, monkeypatch):
    whole, cut = Toy(), Toy()
    trained(whole, steps=1)
    optimizer = AdamW(
        cut.named_parameters(),
        lr=1e-2,
        weight_decay=0.1,
        placement="auto",
        paging=Paging(PAGE_BYTES, 2 * PAGE_BYTES, fake_pool(10**6)),
    )
    optimizer.zero_grad()
    cut(inputs(1)[0]).square().sum().backward()
    real, calls = adamw.adamw_step_, []

    def sometimes(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 3, 4):
            raise torch.OutOfMemoryError("injected")
        real(*args, **kwargs)

    monkeypatch.setattr(adamw, "adamw_step_", sometimes)
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(grad_scale=0.5)
    optimizer.step(grad_scale=0.5)
    assert optimizer.steps_done == 1
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
