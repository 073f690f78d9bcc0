"""The compiled loops touch nothing outside their tensors: beside each lies memory that no one may.

Each tensor ends right before a page without any rights, or begins right behind one, so that a read
or a write one element too far ends the process; hence a process of its own. Tensors that do not
belong together never reach the loops.
"""

import contextlib
import subprocess
import sys

import pytest
import torch

from halfbyte.kernels import native
from halfbyte.kernels.adamw import adamw8bit_step_
from halfbyte.kernels.attention import causal_attention_backward
from halfbyte.kernels.gated import gated_backward_, gated_forward
from halfbyte.kernels.rms_norm import add_rms_norm, rms_norm_backward
from halfbyte.kernels.rope import rope_, rope_backward
from halfbyte.kernels.softmax_loss import softmax_loss_

pytestmark = pytest.mark.skipif(
    native.library() is None or not sys.platform.startswith("linux"), reason="no compiled loops"
)

PROGRAM = '''
import ctypes, mmap, os
import torch
import halfbyte.kernels.adamw as adamw, halfbyte.kernels.nf4 as nf4
from halfbyte.kernels.codebooks import dynamic_map
from halfbyte.kernels.attention import causal_attention_backward
from halfbyte.kernels.gated import gated_backward_, gated_forward
from halfbyte.kernels.rms_norm import add_rms_norm, rms_norm_backward
from halfbyte.kernels.rope import rope_, rope_backward
from halfbyte.kernels.softmax_loss import softmax_loss_

PAGE, NO_RIGHTS = mmap.PAGESIZE, 0
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []

def fenced(tensor):
    """Return the tensor's values in memory whose neighbour, behind or before, no one may touch."""
    size = -(-max(tensor.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + size):
        assert libc.mprotect(page, PAGE, NO_RIGHTS) == 0
    kept.append(memory)
    offset = PAGE + (size - tensor.nbytes if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)

def normal(*shape, dtype=torch.bfloat16):
    return fenced(torch.randn(shape).to(dtype))

def fence_all(tensors):
    return [fenced(tensor) for tensor in tensors]

def dies(touch):
    """Whether a process that calls `touch` is ended for it."""
    child = os.fork()
    if not child:
        touch()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0

def run_all():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, block in (((1, 1), 64), ((7, 13), 64), ((768, 129), 64), ((515, 300), 4096)):
            print("4 bits", dtype, shape, block, flush=True)
            packed, absmax = nf4.quantize_4bit(normal(*shape, dtype=dtype), block_size=block)
            form = {"shape": shape, "dtype": dtype, "block_size": block}
            plain = nf4.dequantize_4bit(*fence_all([packed, absmax]), **form)
            codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
            torch.ops.halfbyte.quantize_blockwise(fenced(absmax))
            nested = [codes, nested_absmax, dynamic_map(signed=True), offset]
            out = nf4.dequantize_nested(*fence_all([packed, *nested]), **form)
            assert torch.isfinite(out).all() and (out - plain).abs().max() < 0.1
    for numel in (1, 255, 257, 40_000):
        print("adamw", numel, flush=True)
        blocks = -(-numel // 256)
        adamw.adamw8bit_step_(
            normal(numel, dtype=torch.float32), normal(numel, dtype=torch.float32),
            *fence_all(torch.randint(0, 256, (2, numel), dtype=torch.uint8)),
            *fence_all(torch.rand(2, blocks)),
            step=3, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01,
        )
    for rows, size in ((1, 1), (3, 7), (5, 64), (130, 300)):
        print("rows", rows, size, flush=True)
        x, delta, grad = (normal(rows, size) for _ in range(3))
        weight = normal(size, dtype=torch.float32)
        add_rms_norm(x, delta, weight, 1e-5)
        add_rms_norm(x, None, weight, 1e-5)
        rms_norm_backward(grad, x, weight, 1e-5, delta)
        gate_up = normal(rows, 2 * size)
        gated_forward(gate_up, size, "silu")
        gated_backward_(gate_up, grad, normal(rows, 6).split(3, 1), normal(rows, 4), size, "silu")
        for dtype in (torch.float32, torch.bfloat16):
            target = fenced(torch.randint(0, size, (rows,)))
            softmax_loss_(normal(rows, size, dtype=dtype), target)
    for tokens, heads, size, rotated in ((1, 1, 16, 16), (5, 3, 64, 32), (33, 8, 80, 80)):
        print("heads", tokens, heads, size, flush=True)
        angles = [normal(tokens, rotated, dtype=torch.float32) for _ in range(2)]
        rope_(normal(tokens, 3 * heads, size), *angles, heads + heads)
        grads = [normal(tokens, heads, size) for _ in range(3)]
        rope_backward(*grads, *angles, normal(tokens, 3 * heads * size))
        query, key, value, out, grad = (normal(2, heads, tokens, size) for _ in range(5))
        lse = normal(2, heads, tokens, dtype=torch.float32)
        causal_attention_backward(query, key, value, out, lse, grad, scale=size**-0.5)

torch.manual_seed(0)
for at_end in (True, False):
    print("fence", at_end, flush=True)
    tensor = normal(3)
    assert dies(lambda: ctypes.string_at(tensor.data_ptr() + (6 if at_end else -1), 1))
    run_all()
    kept.clear()
print("done", flush=True)
'''


def test_nothing_outside_the_tensors_is_touched():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.stdout.splitlines()[-1:], result.stderr[-2000:])
    assert result.stdout.endswith("done\n")


class Loops:
    """Stands for the library, and counts who calls it."""

    def __init__(self):
        self.called = []

    def __getattr__(self, name):
        return lambda *_: self.called.append(name)


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype)


def codes(length):
    return torch.zeros(length, dtype=torch.uint8)


SETTINGS = {"step": 1, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
FLOAT, LONG = torch.float32, torch.int64
MISFITS = {
    "a norm's weight is too short": lambda: add_rms_norm(
        normal(3, 8), None, normal(7, dtype=FLOAT), 1e-5
    ),
    "its weight has half the bytes": lambda: add_rms_norm(normal(3, 8), None, normal(8), 1e-5),
    "what is added has fewer rows": lambda: add_rms_norm(
        normal(3, 8), normal(1, 8), normal(8, dtype=FLOAT), 1e-5
    ),
    "the gradient has fewer rows": lambda: rms_norm_backward(
        normal(1, 8), normal(3, 8), normal(8, dtype=FLOAT), 1e-5, None
    ),
    "gate and up are too narrow": lambda: gated_forward(normal(3, 9), 8, "silu"),
    "the hidden gradient is too short": lambda: gated_backward_(
        normal(3, 16), normal(1, 8), (normal(3, 2), normal(3, 2)), normal(3, 2), 8, "silu"
    ),
    "angles for fewer tokens": lambda: rope_(
        normal(3, 4, 16), normal(1, 16, dtype=FLOAT), normal(1, 16, dtype=FLOAT), 2
    ),
    "no room for the gradient": lambda: rope_backward(
        *(normal(3, 2, 16) for _ in range(3)), *normal(2, 3, 16, dtype=FLOAT), normal(3, 95)
    ),
    "keys of fewer heads": lambda: causal_attention_backward(
        normal(1, 2, 4, 16), normal(1, 1, 4, 16), *(normal(1, 2, 4, 16) for _ in range(2)),
        normal(1, 2, 4, dtype=FLOAT), normal(1, 2, 4, 16), scale=1.0,
    ),
    "sums of fewer tokens": lambda: causal_attention_backward(
        *(normal(1, 2, 4, 16) for _ in range(4)),
        normal(1, 2, 3, dtype=FLOAT), normal(1, 2, 4, 16), scale=1.0,
    ),
    "fewer targets than rows": lambda: softmax_loss_(normal(3, 8), codes(2).to(LONG)),
    "targets of half the bytes": lambda: softmax_loss_(normal(3, 8), codes(3).int()),
    "a target beyond the columns": lambda: softmax_loss_(normal(3, 8), torch.tensor([0, 8, 1])),
    "a target before them": lambda: softmax_loss_(normal(3, 8), torch.tensor([0, -1, 1])),
    "fewer gradients than parameters": lambda: adamw8bit_step_(
        normal(300, dtype=FLOAT), normal(256, dtype=FLOAT), codes(300), codes(300),
        *torch.zeros(2, 2), **SETTINGS,
    ),
    "fewer scales than blocks": lambda: adamw8bit_step_(
        *normal(2, 300, dtype=FLOAT), codes(300), codes(300), *torch.zeros(2, 1), **SETTINGS
    ),
}  # fmt: skip


def test_what_belongs_together_does(monkeypatch):
    loops = Loops()
    monkeypatch.setattr(native, "library", lambda: loops)
    add_rms_norm(normal(3, 8), normal(3, 8), normal(8, dtype=FLOAT), 1e-5)
    softmax_loss_(normal(3, 8), torch.tensor([0, 7, 1]))
    assert loops.called == ["hb_add_rms_norm", "hb_softmax_loss"]


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_belong_together_never_reaches_the_loops(monkeypatch, name):
    loops = Loops()
    monkeypatch.setattr(native, "library", lambda: loops)
    with contextlib.suppress(RuntimeError, IndexError, ValueError, TypeError):
        MISFITS[name]()  # the reference may broadcast, or says what is wrong
    assert not loops.called
