"""Offsets need 64 bits: the hidden states of 524,288 tokens of Llama 8B are 2^31 elements.

Four rows stand in for them, 2^30 elements apart. On a CPU they lie in a sparse file, which takes
the disk no room. There is as much before them, so that an offset which wraps around finds nothing
rather than the end of the process.
"""

import pytest
import torch

pytest.importorskip("triton")

from halfbyte.kernels import (
    border_triton,
    fp8_triton,
    gated_triton,
    head_norm_triton,
    rms_norm_triton,
    rope_triton,
    skinny_triton,
    softmax_loss_triton,
)
from halfbyte.kernels.dropout import Mask
from halfbyte.kernels.rms_norm import Factors

ROWS, PITCH = 4, 2**30 + 64
FIRST = 2**31
ROOM, MOST_TENSORS = 1024, 16
NUMEL = FIRST + (ROWS - 1) * PITCH + ROOM * MOST_TENSORS
SIZE, RANK, HEADS, HEAD_DIM = 40, 8, 4, 16


@pytest.fixture
def far(tmp_path, triton_device, half_dtype):
    """Return a function that returns a copy of a tensor with a dimension's elements far apart."""
    if triton_device.type == "cpu":
        name = str(tmp_path / "sparse")
        whole = torch.from_file(name, shared=True, size=NUMEL, dtype=half_dtype)
    elif torch.cuda.mem_get_info()[0] < 4 * NUMEL:
        pytest.skip("needs 21 GB of free GPU memory")
    else:
        whole = torch.empty(NUMEL, dtype=half_dtype, device=triton_device)
    starts = iter(range(FIRST, NUMEL, ROOM))

    def place(x, dim=0):
        strides = list(x.stride())
        strides[dim] = PITCH
        return whole.as_strided(x.shape, strides, next(starts)).copy_(x)

    return place


class Arguments:
    """What kernels read, the same each time: with rows near to each other, or far apart."""

    def __init__(self, place, device, dtype):
        self.place, self.device, self.dtype = place, device, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.mask = Mask(0.3, torch.tensor([11, 5], device=device), 2)

    def near(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def rows(self, *shape):
        return self.place(self.near(ROWS, *shape))

    def weight(self, *shape):
        return self.near(*shape).float()


class Kernels(Arguments):
    """What each kernel writes."""

    def border(self):
        return border_triton.copy_with_border(self.rows(SIZE), 8)[:, :SIZE]

    def rms_norm(self):
        x, delta, grad, beside = (self.rows(SIZE) for _ in range(4))
        weight = self.weight(SIZE)
        normed = rms_norm_triton.add_rms_norm(x, delta, weight, 1e-5)
        return *normed, rms_norm_triton.rms_norm_backward(grad, x, weight, 1e-5, beside)

    def head_norm(self):
        x, grad = (self.rows(HEADS, HEAD_DIM) for _ in range(2))
        weight = self.weight(HEADS, HEAD_DIM)
        normed = head_norm_triton.head_norm(x, weight, 1e-5)
        return normed, head_norm_triton.head_norm_backward_(grad, x, weight, 1e-5)

    def rope(self):
        x, cos, sin = self.rows(HEADS, HEAD_DIM), self.rows(HEAD_DIM), self.rows(HEAD_DIM)
        return rope_triton.rope_(x, cos, sin, HEADS)

    def rope_backward(self):
        grads = [self.rows(HEADS, HEAD_DIM) for _ in range(3)]
        cos, sin, out = (self.rows(n) for n in (HEAD_DIM, HEAD_DIM, 3 * HEADS * HEAD_DIM))
        return rope_triton.rope_backward(*grads, cos, sin, out)

    def rope_backward_of_heads_far_apart(self):
        grads = [self.place(self.near(ROWS, HEADS, HEAD_DIM), 1) for _ in range(3)]
        cos, sin, out = (self.near(ROWS, n) for n in (HEAD_DIM, HEAD_DIM, 3 * HEADS * HEAD_DIM))
        return rope_triton.rope_backward(*grads, cos, sin, out)

    def gated_forward(self):
        return gated_triton.gated_forward(self.rows(2 * SIZE), SIZE, "silu")

    def gated_product(self):
        gate_up, lora_A = self.rows(2 * SIZE), self.near(RANK, SIZE)
        return gated_triton.gated_product(gate_up, SIZE, "silu", lora_A, mask=self.mask)

    def gated_backward(self):
        gate_up, grad, gb = self.rows(2 * SIZE), self.rows(SIZE), self.rows(RANK)
        xas, lora_A = (self.rows(RANK), self.rows(RANK)), self.near(RANK, SIZE)
        found = gated_triton.gated_backward_(
            gate_up, grad, xas, gb, SIZE, "silu", self.mask, lora_A
        )
        return gate_up, *found

    def rank_product(self):
        out, x, factor = self.rows(RANK), self.rows(SIZE), self.near(SIZE, RANK)
        scaled = skinny_triton.rank_product_(out, x, factor, mask=self.mask, scaling=0.5)
        return out, scaled

    def rank_gradient(self):
        gb, x, grad_x, lora_A = (*(self.rows(n) for n in (RANK, SIZE, SIZE)), self.near(RANK, SIZE))
        return skinny_triton.rank_gradient(gb, x, self.mask, lora_A, grad_x), grad_x

    def rank_gradient_of_what_was_normed(self):
        norm = Factors(self.weight(ROWS), self.weight(SIZE))
        return skinny_triton.rank_gradient(self.rows(RANK), self.rows(SIZE), norm=norm)

    def quantize_rows(self):
        balance = torch.ones(1, device=self.device)
        rows = fp8_triton.quantize_rows(self.rows(SIZE), self.rows(RANK), balance)
        return rows.values.float(), rows.scale

    def softmax_loss(self):
        logits, target = self.rows(SIZE), torch.arange(ROWS, device=self.device)
        return softmax_loss_triton.softmax_loss_(logits, target), logits


@pytest.mark.parametrize("name", [name for name in vars(Kernels) if not name.startswith("_")])
def test_rows_far_apart_give_what_near_ones_give(name, far, triton_device, half_dtype):
    def stay(x, dim=0):
        return x

    found = []
    for place in (far, stay):
        out = getattr(Kernels(place, triton_device, half_dtype), name)()
        found.append([out] if isinstance(out, torch.Tensor) else out)
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)
