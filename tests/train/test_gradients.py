"""What the host learns of a step's gradients: the loss and the norm, or whose rows were bad."""

import dataclasses

import pytest
import torch

from halfbyte.memory.host_copy import HostBuffers
from halfbyte.train.gradients import MEASURED, Gradients, NonFiniteError


@pytest.fixture
def gradients(batch_of):
    """Return `make(*losses, norm)` of a step of two micro-steps, rows 5, 6 and 20."""
    first = dataclasses.replace(batch_of([4, 7]), rows=(4, 5))
    second = dataclasses.replace(batch_of([6], seed=1), rows=(19,))

    def make(*measured):
        on_host = HostBuffers().copy({MEASURED: torch.tensor(measured)})
        return Gradients(torch.ones(()), on_host, 2, [first, second], [[first], [second]])

    return make


def test_losses_are_summed_and_tokens_counted(gradients):
    result = gradients(0.5, 0.25, 3.0).result()
    assert (result.loss, result.grad_norm) == (0.75, 3.0)
    assert result.tokens == 17
    assert result.supervised_tokens == sum(b.num_supervised for b in gradients(1, 1, 1).batches)


@pytest.mark.parametrize(
    ("measured", "message", "rows"),
    [
        ((0.5, float("nan"), 1.0), r"micro-step 2 of 2 \(6 tokens\) is nan, in row 20 of", (19,)),
        ((float("inf"), 0.5, 1.0), "micro-step 1 of 2.* is inf, in rows 5, 6 of", (4, 5)),
        ((0.5, 0.5, float("inf")), "gradient norm is inf, in rows 5, 6, 20 of", (4, 5, 19)),
    ],
)
def test_what_is_not_finite_is_told_by_its_rows(gradients, measured, message, rows):
    with pytest.raises(NonFiniteError, match=f"step 3: .*{message}") as caught:
        gradients(*measured).result()
    assert caught.value.rows == rows


def test_many_rows_are_counted_not_listed(gradients):
    made = gradients(0.5, 0.5, float("nan"))
    many = dataclasses.replace(made.batches[0], rows=tuple(range(40)))
    made = dataclasses.replace(made, groups=[[many]])
    with pytest.raises(NonFiniteError, match="15, 16 and 24 more of the data"):
        made.result()
