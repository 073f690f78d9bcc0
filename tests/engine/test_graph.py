import pytest
import torch
from torch import nn

from halfbyte.engine.attention import Layout
from halfbyte.engine.graph import Graphs, _Size, accumulate


def _graphs(device):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8, device=device))
    weight.grad = torch.zeros_like(weight)

    def run(x, cos, sin, layout, seed):
        return torch.tanh(x @ weight) * cos + sin

    return Graphs([weight]), weight, run


def _inputs(device, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 8, generator=generator).to(device) for _ in range(3)]


def test_without_a_gpu_the_layers_run_as_they_are():
    graphs, weight, run = _graphs("cpu")
    layout = Layout(1, 4)
    for seed in range(3):
        inputs = _inputs("cpu", 4, seed)
        weight.grad.zero_()
        out = graphs(run, *inputs, layout, None)
        assert torch.equal(out, run(*inputs, layout, None))
        out.sum().backward()
        assert weight.grad.norm() > 0


def test_gradients_are_added_to_what_is_there_and_not_kept():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 5)) for _ in range(37)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)

    def run():
        x = torch.ones(2, 5)
        for weight in weights:
            x = torch.tanh(x @ weight) + x
        return x

    expected = torch.autograd.grad(run().sum(), weights)
    output = run()
    accumulate(output, weights, torch.ones_like(output))
    for weight, gradient in zip(weights, expected, strict=True):
        assert torch.equal(weight.grad, gradient + 1)
    again = run()
    again.sum().backward()  # no hook is left
    assert torch.equal(weights[0].grad, 2 * expected[0] + 1)


def _packed(*lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Layout(1, sum(lengths), bounds, max(lengths))


def test_batches_of_about_the_same_documents_share_a_graph():
    sizes = {_Size.of(1024, _packed(*lengths), None) for lengths in ([300, 724], [700, 200, 124])}
    assert len(sizes) == 1
    (size,) = sizes
    assert (size.tokens, size.documents, size.longest) == (1024, 16, 1024)
    assert _Size.of(1024, _packed(*[4] * 256), None) not in sizes
    assert _Size.of(1024, _packed(300, 724), torch.zeros(2)) not in sizes
    assert _Size.of(1028, _packed(*[4] * 257), None) is None


@pytest.mark.gpu
def test_replayed_steps_equal_plain_ones():
    graphs, weight, run = _graphs("cuda")
    for step in range(6):
        rows = (4, 6)[step % 2]
        inputs = _inputs("cuda", rows, step)
        layout = Layout(1, rows)
        weight.grad.zero_()
        out = graphs(run, *inputs, layout, None)
        (out * out).sum().backward()
        actual = weight.grad.clone()
        weight.grad.zero_()
        expected = run(*inputs, layout, None)
        (expected * expected).sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(actual, weight.grad)
        del out, expected  # as a step does: nodes of an older graph would spoil a recording
    assert len(graphs._recorded) == 2


@pytest.mark.gpu
def test_a_recording_that_breaks_off_costs_nothing_else():
    graphs, _, run = _graphs("cuda")

    def waits(*inputs):
        out = run(*inputs)
        torch.cuda.current_stream().synchronize()  # no recording allows it
        return out

    stream = torch.cuda.current_stream()
    for step in range(3):
        inputs = _inputs("cuda", 4, step)
        out = graphs(waits, *inputs, Layout(1, 4), None)
        torch.testing.assert_close(out, run(*inputs, Layout(1, 4), None))
        torch.randn(4, device="cuda")
        assert torch.cuda.current_stream() == stream
    assert graphs.is_stopped
