"""The product of a few tokens: reference against float64, the CUDA twin against the reference."""

import pytest
import torch

from halfbyte.kernels.decode_attention import Join
from halfbyte.kernels.matvec_4bit import matvec_4bit
from halfbyte.kernels.matvec_4bit_parts import Gate, Group, before_product
from halfbyte.kernels.rms_norm import Norm
from halfbyte.quant.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("poisoned")

# Outputs of the siblings, K, rank, what stands before: odd rows; a part of a step, one and a part;
# `x A^T` in two parts.
CASES = [
    ((5,), 64, 0, None),
    ((9, 7), 320, 3, "silu"),
    ((3, 6), 192, 5, "gelu_tanh"),
    ((4, 3, 5), 1088, 4, "norm"),
    ((2,), 4160, 2, "silu"),
]


def _group(outputs, K, rank, device, dtype, *, bias=True, **settings):
    def random(*shape, scale):
        return (torch.randn(shape) * scale).to(dtype).to(device)

    weights = [QuantizedWeight.quantize(random(n, K, scale=0.05), **settings) for n in outputs]
    return Group(
        tuple(weights),
        random(rank * len(outputs), K, scale=0.1) if rank else None,
        random(sum(outputs), rank, scale=0.1) if rank else None,
        random(sum(outputs), scale=1.0) if bias else None,
    )


def _exact(x, group, before, residual):
    """The formula in float64, with the weights as they are dequantized in float32.

    On the CPU: on a GPU norms and gates would go to Triton, which computes in float32.
    """

    def wide(tensor):
        return None if tensor is None else tensor.cpu().double()

    double = Group(
        tuple(wide(w.dequantize(torch.float32)) for w in group.weights),
        *map(wide, (group.lora_A, group.lora_B, group.bias)),
    )
    if isinstance(before, Norm):
        before = Norm(wide(before.weight), before.eps)
    y = matvec_4bit.__wrapped__(wide(x), double, before=before, residual=wide(residual))
    return y.to(x.device)


def _error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def _before(kind, K, device):
    if kind == "norm":
        return Norm(torch.rand(K, device=device) + 0.5, 1e-5)
    return Gate(kind) if kind else None


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("outputs", "K", "rank", "before"), CASES)
def test_twin_is_as_exact_as_the_reference(
    outputs, K, rank, tokens, before, triton_device, half_dtype
):
    twin = pytest.importorskip("halfbyte.kernels.matvec_4bit_triton")
    torch.manual_seed(0)
    group = _group(outputs, K, rank, triton_device, half_dtype)
    gated = before in ("silu", "gelu_tanh")
    x = torch.randn(tokens, K * (2 if gated else 1)).to(half_dtype).to(triton_device)
    before = _before(before, K, triton_device)
    residual = torch.randn(tokens, sum(outputs)).to(half_dtype).to(triton_device)
    exact = _exact(x, group, before, residual)
    reference = matvec_4bit.__wrapped__(x, group, before=before, residual=residual)
    ours = twin.matvec_4bit(x, group, before=before, residual=residual)
    assert ours.dtype == half_dtype
    assert _error(ours, exact) < 2 * _error(reference, exact) < 0.02


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("heads", "rank", "parts"), [(4, 3, 3), (12, 0, 65)])
def test_parts_of_attention_are_joined_on_the_way(
    heads, rank, parts, tokens, triton_device, half_dtype
):
    twin = pytest.importorskip("halfbyte.kernels.matvec_4bit_triton")
    torch.manual_seed(0)
    group = _group((5,), heads * 16, rank, triton_device, half_dtype)
    values = torch.randn(tokens, heads * parts * 16, device=triton_device)
    largest = torch.randn(tokens, heads, parts, device=triton_device) * 5
    largest[:, :, 1] = -torch.inf
    how = Join(largest, torch.rand(tokens, heads, parts, device=triton_device) + 1, half_dtype)
    joined = before_product(values, how)
    assert joined.dtype == half_dtype
    exact = _exact(joined, group, None, None)
    for product in (twin.matvec_4bit, matvec_4bit.__wrapped__):
        y = product(values, group, before=how)
        assert y.dtype == half_dtype
        assert _error(y, exact) < 5e-3


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(
    "settings", [{"double_quant": False}, {"quant_type": "fp4"}, {"block_size": 128}]
)
def test_every_kind_of_weight_and_dtype(tokens, settings, triton_device):
    twin = pytest.importorskip("halfbyte.kernels.matvec_4bit_triton")
    torch.manual_seed(0)
    group = _group((6, 3), 256, 4, triton_device, torch.float32, bias=False, **settings)
    x = torch.randn(tokens, 256, device=triton_device)
    exact = _exact(x, group, None, None)
    # Several tokens are float16 in tensor cores; the lookup on a GPU is good to 3e-5 for one.
    bound = 2e-3 if tokens > 1 else 1e-6 if triton_device.type == "cpu" else 1e-3
    assert _error(twin.matvec_4bit(x, group), exact) < bound
    assert _error(matvec_4bit.__wrapped__(x, group), exact) < 1e-6


def test_what_the_kernels_cannot_serve_takes_the_reference(triton_device):
    twin = pytest.importorskip("halfbyte.kernels.matvec_4bit_triton")
    torch.manual_seed(0)
    dense = Group((torch.randn(5, 64, device=triton_device),))
    x = torch.randn(1, 64, device=triton_device)
    torch.testing.assert_close(twin.matvec_4bit(x, dense), x @ dense.weights[0].t())
    many = torch.randn(twin.MAX_TOKENS + 1, 64, device=triton_device)
    packed = _group((3,), 64, 2, triton_device, torch.float32)
    expected = matvec_4bit.__wrapped__(many, packed)
    torch.testing.assert_close(twin.matvec_4bit(many, packed), expected)
