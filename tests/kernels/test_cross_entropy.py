import pytest
import torch

from halfbyte.errors import DataError
from halfbyte.kernels import native, softmax_loss_cpu
from halfbyte.kernels.cross_entropy import linear_cross_entropy

OPTIONS = [
    {},
    {"bias": True},
    {"logit_scale": 0.25},
    {"softcap": 5.0},
    {"bias": True, "logit_scale": 2.0, "softcap": 3.0},
]


def make(rows=37, hidden_size=24, vocabulary=101, dtype=torch.float32, ignored=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, hidden_size, generator=generator).mul(0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    if ignored:
        labels[::5] = -100
    return hidden, weight, labels


def exact(hidden, weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Return loss and gradients of hidden, weight and bias in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    z = leaves[0] @ leaves[1].T
    if bias is not None:
        leaves.append(bias.detach().double().requires_grad_())
        z = z + leaves[2]
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, leaves)


def with_bias(options, vocabulary):
    bias = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    return options | {"bias": bias} if "bias" in options else options


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_rows", [None, 1, 7, 64])
def test_equals_float64(options, chunk_rows):
    hidden, weight, labels = make()
    options = with_bias(options, len(weight))
    expected, (expected_grad, *_) = exact(hidden, weight, labels, **options)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows, **options)
    (loss / 3).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), expected_grad / 3, rtol=1e-4, atol=1e-5)
    assert not hidden.grad[::5].any()


@pytest.mark.parametrize("options", OPTIONS)
def test_bfloat16_is_no_worse_than_plain_bfloat16(options):
    hidden, weight, labels = make(128, 64, 1000, torch.bfloat16)
    options = with_bias(options, len(weight))
    expected, (expected_grad, *_) = exact(hidden, weight, labels, **options)
    plain = hidden.clone().requires_grad_()
    z = torch.nn.functional.linear(plain, weight).float()
    z = (z + options.get("bias", 0.0)) * options.get("logit_scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    plain_loss = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    plain_loss.backward()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, **options)
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16
    error = (hidden.grad.double() - expected_grad).norm()
    assert error <= 2 * (plain.grad.double() - expected_grad).norm()
    assert abs(loss - expected) <= 2 * abs(plain_loss - expected) + 1e-3


@pytest.mark.parametrize("options", OPTIONS)
def test_a_trainable_head_gets_its_gradient(options):
    hidden, weight, labels = make()
    options = with_bias(options, len(weight))
    expected, grads = exact(hidden, weight, labels, **options)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    if "bias" in options:
        leaves.append(options["bias"].requires_grad_())
    loss = linear_cross_entropy(hidden, weight, labels, chunk_rows=8, **options)
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=1e-5)
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-4, atol=1e-5)


def test_without_labels_the_loss_and_its_gradient_are_zero():
    hidden, weight, labels = make()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_without_gradient_nothing_is_saved():
    hidden, weight, labels = make()
    hidden.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.grad_fn is None
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels).detach())


def test_the_graph_can_be_walked_twice():
    hidden, weight, labels = make()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


@pytest.mark.parametrize("label", [101, -1])
def test_a_label_outside_the_vocabulary_is_refused(label):
    hidden, weight, labels = make()
    labels[3] = label
    with pytest.raises(DataError, match=f"from 0 to 100, got .*{label}"):
        linear_cross_entropy(hidden, weight, labels)


def test_large_logits_do_not_overflow():
    hidden, weight, labels = make()
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, logit_scale=1e4)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(hidden.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (40, 1001), (0, 7)])
@pytest.mark.parametrize("with_compiler", [True, False])
def test_softmax_loss_on_a_cpu_equals_float64(shape, dtype, with_compiler, monkeypatch):
    if not with_compiler:
        monkeypatch.setattr(native, "library", lambda: None)
    generator = torch.Generator().manual_seed(0)
    logits = (6 * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randint(0, shape[1], (shape[0],), generator=generator)
    for scale in (1.0, 0.5):
        leaf = logits.double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(leaf * scale, target, reduction="none")
        (grad,) = torch.autograd.grad(expected.sum(), leaf)
        buffer = logits.clone()
        loss = softmax_loss_cpu.softmax_loss_(buffer, target, logit_scale=scale)
        torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-5, atol=1e-5)
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
        torch.testing.assert_close(buffer.double(), grad, rtol=rounding, atol=1e-6)
