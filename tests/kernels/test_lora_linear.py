import collections

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from halfbyte.kernels.lora_linear import lora_linear
from halfbyte.quant.weight import QuantizedWeight


class CountOps(TorchDispatchMode):
    """Counts the ops that ran, by name."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def make(rows, in_features, out_features, rank, *, dtype=torch.bfloat16, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=generator) * std

    x = normal(*rows, in_features).to(dtype).requires_grad_()
    weight = normal(out_features, in_features, std=in_features**-0.5).to(dtype)
    b = normal(out_features).to(dtype) if bias else None
    lora_A = normal(rank, in_features, std=in_features**-0.5).requires_grad_()
    lora_B = normal(out_features, rank, std=0.3).requires_grad_()
    grad_y = normal(*rows, out_features).to(dtype)
    return x, weight, b, lora_A, lora_B, grad_y


def reference(x, weight, bias, lora_A, lora_B, scaling, dtype):
    x, weight, lora_A, lora_B = (t.to(dtype) for t in (x, weight, lora_A, lora_B))
    y = F.linear(x, weight, None if bias is None else bias.to(dtype))
    return y + (x @ lora_A.t() @ lora_B.t()) * scaling


def outcome(function, grad_y, *leaves):
    for leaf in leaves:
        leaf.grad = None
    y = function()
    y.backward(grad_y.to(y.dtype))
    return [y.detach().double()] + [leaf.grad.double() for leaf in leaves]


def relative_errors(got, exact):
    return [
        ((g - e).norm() / e.norm().clamp_min(1e-30)).item() for g, e in zip(got, exact, strict=True)
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "rank"),
    [
        ((64,), 128, 96, 16),
        ((2, 33), 65, 31, 3),
        ((1,), 7, 5, 1),
        ((3, 2, 5), 130, 259, 8),
        ((1, 1), 1, 1, 1),
    ],
)
def test_error_is_at_most_twice_the_plain_bf16_formulas(
    rows, in_features, out_features, rank, bias
):
    x, weight, b, A, B, grad_y = make(rows, in_features, out_features, rank, bias=bias)
    leaves = (x, A, B)
    exact = outcome(
        lambda: reference(x.double(), weight, b, A.double(), B.double(), 2.0, torch.float64),
        grad_y,
        *leaves,
    )
    plain = outcome(lambda: reference(x, weight, b, A, B, 2.0, torch.bfloat16), grad_y, *leaves)
    ours = outcome(lambda: lora_linear(x, weight, b, A, B, 2.0), grad_y, *leaves)
    rounding = 2.0**-9
    for got, bound in zip(relative_errors(ours, exact), relative_errors(plain, exact), strict=True):
        assert got <= 2 * bound + rounding


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), (2, 0)])
def test_every_gradient_passes_gradcheck_in_float64(shape):
    x, weight, b, A, B, _ = make(shape, 6, 4, 3, dtype=torch.float64)
    A, B = (t.detach().double().requires_grad_() for t in (A, B))
    b.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: lora_linear(t[0], weight, t[1], t[2], t[3], 0.7), (x, b, A, B)
    )


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_quantized_weight_gives_what_its_dense_values_give(double_quant):
    x, weight, b, A, B, grad_y = make((8,), 32, 16, 4)
    quantized = QuantizedWeight.quantize(weight, double_quant=double_quant)
    leaves = (x, A, B)
    dense = outcome(lambda: lora_linear(x, quantized.dequantize(), b, A, B, 1.0), grad_y, *leaves)
    packed = outcome(lambda: lora_linear(x, quantized, b, A, B, 1.0), grad_y, *leaves)
    assert all(torch.equal(a, c) for a, c in zip(dense, packed, strict=True))


def test_nothing_of_the_weights_size_is_saved():
    x, weight, b, A, B, _ = make((8,), 32, 16, 4)
    quantized = QuantizedWeight.quantize(weight)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, quantized, b, A, B, 1.0)
    assert saved
    assert all(tuple(t.shape) != tuple(weight.shape) for t in saved)


def test_a_compiled_graph_does_not_keep_the_dense_weight():
    x, weight, b, A, B, grad_y = make((8,), 40, 16, 4)
    quantized = QuantizedWeight.quantize(weight)
    eager = outcome(lambda: lora_linear(x, quantized, b, A, B, 0.5), grad_y, x, A, B)
    kept = []

    def look(graph, _):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"] for node in output.args[0] if hasattr(node, "meta"))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    compiled = torch.compile(lora_linear, fullgraph=True, backend=backend)
    traced = outcome(lambda: compiled(x, quantized, b, A, B, 0.5), grad_y, x, A, B)
    assert len(kept) > 1
    assert all(isinstance(t, torch.Tensor) and tuple(t.shape) != (16, 40) for t in kept)
    for got, want in zip(traced, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_gradients_have_the_dtype_of_their_parameters():
    x, weight, b, A, B, grad_y = make((8,), 32, 16, 4)
    lora_linear(x, weight, b, A, B, 1.0).backward(grad_y)
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


def test_frozen_adapters_still_pass_the_gradient_through():
    x, weight, b, A, B, grad_y = make((8,), 32, 16, 4)
    want = outcome(lambda: lora_linear(x, weight, b, A, B, 1.0), grad_y, x, A, B)[1]
    frozen = outcome(lambda: lora_linear(x, weight, b, A.detach(), B.detach(), 1.0), grad_y, x)[1]
    assert torch.equal(want, frozen)


def test_an_input_without_gradient_costs_one_dequantization():
    x, weight, b, A, B, grad_y = make((8,), 32, 16, 4)
    quantized = QuantizedWeight.quantize(weight)
    with CountOps() as ops:
        lora_linear(x.detach(), quantized, b, A, B, 1.0).backward(grad_y)
    assert (ops.count["linear_4bit"], ops.count["grad_input_4bit"]) == (1, 0)
    assert A.grad is not None


def test_no_rows_give_zero_gradients():
    x, weight, b, A, B, grad_y = make((2, 0), 32, 16, 4)
    y = lora_linear(x, weight, b, A, B, 1.0)
    y.backward(grad_y)
    assert y.shape == (2, 0, 16)
    assert x.grad.shape == x.shape
    assert not A.grad.any()
    assert not B.grad.any()


class TestDropout:
    def test_mask_is_the_same_in_forward_and_backward(self):
        x, weight, _, A, B, _ = make((64,), 32, 16, 4, dtype=torch.float32)
        p, scaling = 0.5, 2.0
        torch.manual_seed(3)
        y = lora_linear(x, weight, None, A, B, scaling, dropout_p=p)
        torch.manual_seed(3)
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
        dropped = x * mask / (1 - p)
        want = x @ weight.t() + scaling * (dropped @ A.t() @ B.t())
        torch.testing.assert_close(y, want)
        grad_y = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, A, B), grad_y)
        expected = torch.autograd.grad(want, (x, A, B), grad_y)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)

    def test_average_over_masks_is_the_layer_without_dropout(self):
        x, weight, b, A, B, _ = make((4,), 16, 8, 4, dtype=torch.float32)
        torch.manual_seed(0)
        with torch.no_grad():
            mean = (
                sum(lora_linear(x, weight, b, A, B, 1.0, dropout_p=0.3) for _ in range(4000)) / 4000
            )
            torch.testing.assert_close(
                mean, lora_linear(x, weight, b, A, B, 1.0), atol=0.06, rtol=0.02
            )

    def test_evaluation_drops_nothing(self):
        x, weight, b, A, B, _ = make((4,), 16, 8, 4)
        evaluated = lora_linear(x, weight, b, A, B, 1.0, dropout_p=0.9, training=False)
        assert torch.equal(evaluated, lora_linear(x, weight, b, A, B, 1.0))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_repeats_the_mask(self, reentrant):
        x, weight, b, A, B, grad_y = make((16,), 32, 16, 4)

        def layer(inputs):
            return lora_linear(inputs, weight, b, A, B, 1.0, dropout_p=0.4)

        torch.manual_seed(5)
        plain = outcome(lambda: layer(x), grad_y, x, A, B)
        torch.manual_seed(5)
        saved = outcome(lambda: checkpoint(layer, x, use_reentrant=reentrant), grad_y, x, A, B)
        assert all(torch.equal(a, c) for a, c in zip(plain, saved, strict=True))


def test_autocast_computes_in_its_dtype():
    x, weight, b, A, B, _ = make((8,), 32, 16, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, weight, b, A, B, 1.0)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert (x.grad.dtype, A.grad.dtype) == (torch.float32, torch.float32)
    want = lora_linear(x.bfloat16(), weight.bfloat16(), b.bfloat16(), A, B, 1.0)
    assert torch.equal(y, want)


def test_compiles_to_the_same_result():
    x, weight, b, A, B, grad_y = make((8,), 32, 16, 4)
    eager = outcome(lambda: lora_linear(x, weight, b, A, B, 0.5), grad_y, x, A, B)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    traced = outcome(lambda: compiled(x, weight, b, A, B, 0.5), grad_y, x, A, B)
    for got, want in zip(traced, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "in features"),
        ({"lora_B": torch.zeros(5, 2)}, "lora_B must be"),
        ({"dropout_p": 1.0}, "dropout_p"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(5, 4),
        "bias": None,
        "lora_A": torch.zeros(3, 4),
        "lora_B": torch.zeros(5, 3),
        "scaling": 1.0,
    } | change
    with pytest.raises(ValueError, match=message):
        lora_linear(**arguments)
