"""Parameters and gradients are views of one vector, with gaps that stay empty."""

import torch
from torch import nn

from halfbyte.optim.flat import ALIGNMENT, FlatParameters


def named(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        (f"p{i}", nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        for i, shape in enumerate(shapes)
    ]


def test_parameters_keep_their_values_and_share_the_vector():
    params = named((3, 5), (300,), (16, 32))
    before = [parameter.detach().clone() for _, parameter in params]
    flat = FlatParameters(params)
    for (_, parameter), value in zip(params, before, strict=True):
        assert torch.equal(parameter, value)
    flat.values.zero_()
    assert all(not parameter.any() for _, parameter in params)


def test_backward_fills_the_flat_gradient_and_accumulates():
    params = named((3, 5), (7,))
    flat = FlatParameters(params)
    flat.zero_gradients()
    for _ in range(2):
        sum((parameter * 2).sum() for _, parameter in params).backward()
    assert all(
        torch.equal(slot.of(flat.gradients), torch.full_like(slot.parameter, 4.0))
        for slot in flat.slots
    )
    assert flat.gradients.sum() == 4 * (15 + 7)  # gaps hold nothing


def test_taken_away_gradient_is_attached_again():
    params = named((4, 4))
    flat = FlatParameters(params)
    params[0][1].grad = None  # what model.zero_grad() does
    flat.zero_gradients()
    params[0][1].sum().backward()
    assert flat.gradients.sum() == 16


def test_matrices_come_first_and_slots_are_aligned():
    flat = FlatParameters(named((7,), (3, 5), (9,), (20, 20)))
    assert [slot.name for slot in flat.slots] == ["p1", "p3", "p0", "p2"]
    assert flat.num_decayed == flat.slots[2].start
    assert all(slot.start % ALIGNMENT == 0 for slot in flat.slots)
    assert flat.values.numel() % ALIGNMENT == 0


def test_bf16_parameter_has_a_float32_master_and_float32_gradient_sum():
    params = named((8, 8), dtype=torch.bfloat16)
    parameter = params[0][1]
    flat = FlatParameters(params)
    flat.zero_gradients()
    parameter.sum().backward()
    (parameter * 2**-9).sum().backward()  # lost if it were added to 1 in bf16
    assert parameter.grad is None
    assert torch.equal(flat.slots[0].of(flat.gradients), torch.full((8, 8), 1 + 2**-9))
    flat.slots[0].of(flat.values).fill_(1 + 2**-12)
    flat.publish_masters()
    assert torch.equal(parameter.detach(), torch.ones(8, 8, dtype=torch.bfloat16))
