"""The compiled loops touch nothing outside their tensors: beside each lies memory that no one may.

Each tensor ends right before a page without any rights, or begins right behind one, so that a read
or a write one element too far ends the process; hence a process of its own.
"""

import subprocess
import sys

import pytest

from halfbyte.kernels import native

pytestmark = pytest.mark.skipif(
    native.library() is None or not sys.platform.startswith("linux"), reason="no compiled loops"
)

PROGRAM = '''
import ctypes, mmap, sys
import torch
import halfbyte.kernels.adamw as adamw, halfbyte.kernels.nf4 as nf4
from halfbyte.kernels.codebooks import dynamic_map
from halfbyte.kernels.attention import causal_attention_backward
from halfbyte.kernels.gated import gated_backward_, gated_forward
from halfbyte.kernels.rms_norm import add_rms_norm, rms_norm_backward
from halfbyte.kernels.rope import rope_, rope_backward
from halfbyte.kernels.softmax_loss import softmax_loss_

PAGE, NO_RIGHTS = mmap.PAGESIZE, 0
AT_END = sys.argv[1] == "end"
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []

def fenced(tensor):
    """Return the tensor's values in memory whose neighbour no one may touch."""
    size = -(-max(tensor.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + size):
        assert libc.mprotect(page, PAGE, NO_RIGHTS) == 0
    kept.append(memory)
    offset = PAGE + (size - tensor.nbytes if AT_END else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)

def normal(*shape, dtype=torch.bfloat16):
    return fenced(torch.randn(shape).to(dtype))

def fence_all(tensors):
    return [fenced(tensor) for tensor in tensors]

torch.manual_seed(0)
print("fence", flush=True)
if len(sys.argv) > 2:  # is the fence one?
    tensor = normal(3)
    ctypes.string_at(tensor.data_ptr() + (6 if AT_END else -1), 1)

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape, block in (((1, 1), 64), ((7, 13), 64), ((768, 129), 64), ((515, 300), 4096)):
        print("4 bits", dtype, shape, block, flush=True)
        packed, absmax = nf4.quantize_4bit(normal(*shape, dtype=dtype), block_size=block)
        form = {"shape": shape, "dtype": dtype, "block_size": block}
        plain = nf4.dequantize_4bit(*fence_all([packed, absmax]), **form)
        codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
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
print("done", flush=True)
'''


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("side", ["end", "start"])
def test_nothing_outside_the_tensors_is_touched(side):
    result = run(side)
    assert result.returncode == 0, (result.stdout.splitlines()[-1:], result.stderr[-2000:])
    assert result.stdout.endswith("done\n")


@pytest.mark.parametrize("side", ["end", "start"])
def test_the_fence_is_one(side):
    assert run(side, "touch").returncode < 0
