import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from halfbyte.engine.final_norm import final_norm


def make(dtype=torch.float32, *, is_trained=False, kind=LlamaRMSNorm):
    torch.manual_seed(0)
    norm = kind(96, eps=1e-5)
    norm.weight.data.normal_(1 - (kind is GemmaRMSNorm), 0.2)
    norm.to(dtype).requires_grad_(is_trained)
    return norm, torch.randn(13, 96).to(dtype).requires_grad_()


def run(function, x, weight):
    out = function(x)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    return out.detach().double(), grad.double()


def in_float64(norm, x, weight):
    def formula(x):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return x * scale * (norm.weight.detach().double() + isinstance(norm, GemmaRMSNorm))

    return run(formula, x.detach().double().requires_grad_(), weight.double())


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_least_as_near_to_float64_as_transformers(dtype, kind):
    norm, x = make(dtype, kind=kind)
    weight = torch.randn(13, 96).to(dtype)
    exact = in_float64(norm, x, weight)
    ours = run(lambda x: final_norm(norm, x), x, weight)
    theirs = run(norm, x, weight)
    for got, peer, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).norm() <= 1.2 * (peer - want).norm() + 1e-6 * want.norm()


def test_it_keeps_its_input_and_nothing_else():
    norm, x = make(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        final_norm(norm, x)
    assert sum(t.nbytes for t in kept if t.shape == x.shape) == x.nbytes
    assert len(kept) == 1


def test_a_sum_of_the_output_has_a_gradient():
    norm, x = make()
    final_norm(norm, x).sum().backward()  # its gradient is one number, expanded
    expected = in_float64(norm, x, torch.ones(13, 96))[1]
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_trained_gets_its_gradient():
    norm, x = make(is_trained=True)
    final_norm(norm, x).sum().backward()
    assert norm.weight.grad is not None
