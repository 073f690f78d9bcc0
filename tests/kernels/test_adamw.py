import inspect
import math

import pytest
import torch

from halfbyte.kernels import adamw, adamw_cpu, codebooks
from halfbyte.kernels.adamw import adamw8bit_step_, adamw_step_

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# Short last block, several chunks of the reference.
SIZES = [1, 255, 256, 3001, 256 * 4096 + 77]


def triton_twin(name):
    return getattr(pytest.importorskip("halfbyte.kernels.adamw_triton"), name)


def reference_optimizer(param):
    parameter = torch.nn.Parameter(param.clone())
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=SETTINGS["lr"],
        betas=betas,
        eps=SETTINGS["eps"],
        weight_decay=SETTINGS["weight_decay"],
    )
    return parameter, optimizer


def run(step_, size, *, steps=5, device="cpu", grad_scale=1.0):
    """Return the parameters of `step_` and of torch.optim.AdamW after some steps, on the CPU."""
    generator = torch.Generator().manual_seed(size)
    start = torch.randn(size, generator=generator)
    expected, optimizer = reference_optimizer(start)
    param = start.clone().to(device)
    moments = torch.zeros(2, size, device=device)
    scale = grad_scale.to(device) if isinstance(grad_scale, torch.Tensor) else grad_scale
    for step in range(1, steps + 1):
        grad = torch.randn(size, generator=generator)
        expected.grad = grad * grad_scale
        optimizer.step()
        on_device = grad.to(device)
        step_(param, on_device, *moments, step=step, grad_scale=scale, **SETTINGS)
        assert torch.equal(on_device.cpu(), grad)
    return param.cpu(), expected.detach()


@pytest.mark.parametrize("size", SIZES)
def test_32_bit_update_equals_torch(size):
    param, expected = run(adamw_step_, size)
    torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grad_scale", [0.25, torch.tensor(0.25)])
def test_the_gradient_is_scaled_inside(grad_scale):
    param, expected = run(adamw_step_, 300, grad_scale=grad_scale)
    torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grad_scale", [1.0, 0.25, torch.tensor(0.25)])
def test_triton_32_bit_update_equals_torch(grad_scale, triton_device):
    step_ = triton_twin("adamw_step_")
    param, expected = run(step_, 3001, device=triton_device, grad_scale=grad_scale)
    torch.testing.assert_close(param, expected, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("name", ["adamw_step_", "adamw8bit_step_"])
@pytest.mark.parametrize("scale", [math.nan, torch.tensor(math.nan)])
def test_a_gradient_scale_of_nan_changes_nothing(name, scale, triton_device):
    reference = inspect.unwrap(getattr(adamw, name))
    own = getattr(adamw_cpu, name, reference)
    torch.manual_seed(0)
    steps = ((reference, "cpu"), (own, "cpu"), (triton_twin(name), triton_device))
    for step_, device in steps:
        size, is_32 = 1300, name == "adamw_step_"
        moments = list(torch.rand(2, size)) if is_32 else new_state(size)
        if not is_32:
            moments = [torch.randint_like(t, 256) if t.ndim and t.dtype == torch.uint8 else t + 0.5
                       for t in moments]  # fmt: skip
        state = [t.to(device) for t in (torch.randn(size), *moments)]
        before = [t.clone() for t in state]
        grad = torch.full((size,), math.inf, device=device)
        given = scale.to(device) if isinstance(scale, torch.Tensor) else scale
        step_(state[0], grad, *state[1:], step=3, grad_scale=given, **SETTINGS)
        assert all(map(torch.equal, state, before))


def new_state(size, device="cpu"):
    blocks = -(-size // 256)
    codes = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
    return [*codes, *(torch.zeros(blocks, device=device) for _ in range(2))]


def published_step(param, grad, moments, step):
    """The rule in float64; `moments` are changed to what eight bits keep of them."""
    s = SETTINGS
    m = moments[0] * s["beta1"] + (1 - s["beta1"]) * grad
    v = moments[1] * s["beta2"] + (1 - s["beta2"]) * grad * grad
    m_hat, v_hat = m / (1 - s["beta1"] ** step), v / (1 - s["beta2"] ** step)
    param = param * (1 - s["lr"] * s["weight_decay"]) - s["lr"] * m_hat / (v_hat.sqrt() + s["eps"])
    return param, [rounded(m, signed=True), rounded(v, signed=False)]


def rounded(moment, *, signed):
    """Return the values of the dynamic map, times the block's absmax, that are nearest."""
    table = codebooks.dynamic_map(signed=signed).double()
    padded = torch.nn.functional.pad(moment, (0, -len(moment) % 256)).view(-1, 256)
    absmax = padded.abs().amax(dim=1, keepdim=True)
    scaled = padded / absmax.clamp(min=1e-38)
    nearest = table[(scaled[..., None] - table).abs().argmin(dim=-1)]
    if signed:
        smallest = table[126]
        nearest = torch.where((scaled < 0) & (nearest == 0), smallest, nearest)
    return (nearest * absmax).flatten()[: len(moment)]


def decoded(codes, absmax, *, signed):
    scale = absmax.repeat_interleave(256)[: len(codes)]
    return codebooks.dynamic_map(signed=signed)[codes.int()] * scale


EIGHT_BIT_STEPS = {
    "reference": lambda: inspect.unwrap(adamw8bit_step_),
    "cpu": lambda: adamw_cpu.adamw8bit_step_,
    "triton": lambda: triton_twin("adamw8bit_step_"),
}


@pytest.mark.parametrize("which", EIGHT_BIT_STEPS)
@pytest.mark.parametrize("size", [1, 257, 3001])
def test_8_bit_update_equals_the_published_rule(which, size, triton_device):
    step_ = EIGHT_BIT_STEPS[which]()
    device = triton_device if which == "triton" else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator)
    param, state = start.clone().to(device), new_state(size, device)
    exact, moments = start.double(), [torch.zeros(size, dtype=torch.float64)] * 2
    for step in range(1, 6):
        grad = torch.randn(size, generator=generator)
        step_(param, grad.to(device), *state, step=step, **SETTINGS)
        exact, moments = published_step(exact, grad.double(), moments, step)
    # A moment within rounding of a threshold may take the neighbouring code, at most a few do.
    far = (param.cpu().double() - exact).abs() > 1e-5
    assert int(far.sum()) <= size // 200
    codes1, codes2, absmax1, absmax2 = (t.cpu() for t in state)
    first = (decoded(codes1, absmax1, signed=True).double() - moments[0]).abs()
    second = (decoded(codes2, absmax2, signed=False).double() - moments[1]).abs()
    assert int((first > 1e-5).sum()) <= size // 200
    assert int((second > 1e-6).sum()) <= size // 200


def test_first_8_bit_step_equals_bitsandbytes():
    # From zeros; later steps differ, because bitsandbytes on a CPU rounds its moments coarsely.
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    param, grad = torch.randn(1024), torch.randn(1024)
    theirs, their_state = param.clone(), new_state(1024)
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", grad, theirs, their_state[0], their_state[1],
        SETTINGS["beta1"], SETTINGS["beta2"], 0.0, 0.0, SETTINGS["eps"], 1, SETTINGS["lr"],
        codebooks.dynamic_map(), codebooks.dynamic_map(signed=False),
        their_state[2], their_state[3], SETTINGS["weight_decay"], 1.0, False,
    )  # fmt: skip
    state = new_state(1024)
    adamw8bit_step_(param, grad, *state, step=1, **SETTINGS)
    torch.testing.assert_close(param, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state[2], their_state[2])
    torch.testing.assert_close(state[3], their_state[3])


def test_8_bit_training_follows_32_bit_training():
    torch.manual_seed(0)
    target = torch.randn(2048)
    losses = []
    for eight_bit in (False, True):
        param = torch.zeros(2048)
        state = new_state(2048) if eight_bit else [torch.zeros(2048), torch.zeros(2048)]
        step_ = adamw8bit_step_ if eight_bit else adamw_step_
        for step in range(1, 201):
            step_(param, param - target, *state, step=step, **(SETTINGS | {"weight_decay": 0.0}))
        losses.append((param - target).square().mean().item())
    assert losses[0] < 0.1
    assert losses[1] == pytest.approx(losses[0], rel=0.15)


def test_a_slice_of_a_flat_state_changes_nothing_beside_it():
    param, grad, state = torch.ones(1024), torch.ones(1024), new_state(1024)
    views = [state[0][256:768], state[1][256:768], state[2][1:3], state[3][1:3]]
    adamw8bit_step_(param[256:768], grad[256:768], *views, step=1, **SETTINGS)
    changed = torch.zeros(1024, dtype=torch.bool)
    changed[256:768] = True
    assert torch.equal(param != 1, changed)
    assert torch.equal(state[0] != 0, changed)
    assert torch.equal(state[2] != 0, changed.view(-1, 256)[:, 0])
