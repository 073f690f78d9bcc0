"""Each CUDA kernel against what bounds it, and against its twin in bitsandbytes or torch.

    python benchmarks/kernels_gpu.py [--tokens 8192] [--only quantize,rope]

Two rates bound everything and are measured first: a large copy (bytes read and written), and a
large bf16 product. Of a kernel that moves data the fewest bytes are counted that it can move, each
operand once; of a product its floating-point operations. Sizes are those of Llama-3-8B's layers.
Medians of device time; the cache is cleared between calls. Prints one JSON line a kernel.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from triton.testing import do_bench

from halfbyte.kernels import adamw, gated, rms_norm, rope, skinny, softmax_loss, wide
from halfbyte.kernels.cross_entropy import linear_cross_entropy
from halfbyte.kernels.matvec_4bit import matvec_4bit
from halfbyte.kernels.matvec_4bit_parts import Group
from halfbyte.quant.weight import QuantizedWeight

HIDDEN, WIDE, VOCABULARY, HEADS, KV_HEADS, HEAD, RANK = 4096, 14336, 128256, 32, 8, 128, 16
MATRICES = ((4096, 4096), (14336, 4096), (28672, 8192))
ADAPTERS = 41_943_040  # parameters of rank 16 on seven projections
BYTES_A_WEIGHT = 0.5 + 1 / 64


@dataclass
class Kernel:
    """What to run, how much work it is at least (bytes, or floating-point operations), a twin.

    With `is_recorded` both are replayed as CUDA graphs, as decoding does it: alone they would show
    how long the host takes to launch them.
    """

    name: str
    shape: str
    run: Callable[[], object]
    num_bytes: float = 0
    num_operations: float = 0
    twin: tuple[str, Callable[[], object]] | None = None
    is_recorded: bool = False


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def bitsandbytes():
    try:
        import bitsandbytes
    except ImportError:
        return None
    return bitsandbytes


def twins(weight: Tensor, x: Tensor) -> Iterator[tuple[str, Callable[[], object]] | None]:
    """Yield how bitsandbytes quantizes, dequantizes and multiplies."""
    bnb = bitsandbytes()
    if bnb is None:
        yield from (None, None, None)
        return
    functional, settings = bnb.functional, {"quant_type": "nf4", "compress_statistics": True}
    packed, state = functional.quantize_4bit(weight, **settings)
    for run in (
        partial(functional.quantize_4bit, weight, **settings),
        partial(functional.dequantize_4bit, packed, state),
        partial(functional.gemv_4bit, x[None], packed.t(), state=state),
    ):
        yield "bitsandbytes", run


def four_bit(tokens: int) -> Iterator[Kernel]:
    for rows, columns in MATRICES:
        shape, numel = f"{rows} x {columns}", rows * columns
        weight, x = bf16(rows, columns) * 0.02, bf16(1, columns)
        ours = QuantizedWeight.quantize(weight)
        moved, read = numel * (2 + BYTES_A_WEIGHT), numel * BYTES_A_WEIGHT
        quantize, dequantize, multiply = twins(weight, x)
        run = partial(QuantizedWeight.quantize, weight)
        yield Kernel("quantize", shape, run, moved, twin=quantize)
        yield Kernel("dequantize", shape, ours.dequantize, moved, twin=dequantize)
        run = partial(matvec_4bit, x, Group((ours,)))
        yield Kernel("matrix-vector product", shape, run, read, twin=multiply, is_recorded=True)


@dataclass
class Part:
    weight: QuantizedWeight
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float = 2.0


def assembled(tokens: int) -> Iterator[Kernel]:
    parts = [
        Part(QuantizedWeight.quantize(bf16(WIDE, HIDDEN)), bf16(RANK, HIDDEN), bf16(WIDE, RANK))
        for _ in range(2)
    ]
    columns = HIDDEN + 2 * RANK
    target = torch.empty(2 * WIDE + 2 * RANK, columns, device="cuda", dtype=torch.bfloat16)
    yield Kernel(
        "dequantize beside LoRA", f"2 x {WIDE} x {HIDDEN}",
        lambda: wide.assemble_(target, parts), 2 * WIDE * HIDDEN * (2 + BYTES_A_WEIGHT),
    )  # fmt: skip
    x, weight, out = bf16(tokens, columns), bf16(2 * WIDE, columns), bf16(tokens, 2 * WIDE)
    yield Kernel(
        "product with LoRA inside", f"{tokens} x {2 * WIDE} x {columns}",
        lambda: torch.mm(x, weight.T, out=out), 0, 2.0 * tokens * 2 * WIDE * HIDDEN,
    )  # fmt: skip


def norms(tokens: int) -> Iterator[Kernel]:
    x, delta, grad = (bf16(tokens, HIDDEN) for _ in range(3))
    weight = torch.ones(HIDDEN, device="cuda")
    half, shape, moved = weight.bfloat16(), f"{tokens} x {HIDDEN}", 4 * 2 * tokens * HIDDEN
    yield Kernel(
        "residual + RMSNorm", shape, lambda: rms_norm.add_rms_norm(x, delta, weight, 1e-5),
        moved, 0,
        ("torch", lambda: torch.nn.functional.rms_norm(x + delta, (HIDDEN,), half, 1e-5)),
    )  # fmt: skip
    yield Kernel(
        "RMSNorm backward", shape,
        lambda: rms_norm.rms_norm_backward(grad, x, weight, 1e-5, delta), moved,
    )  # fmt: skip


def gates(tokens: int) -> Iterator[Kernel]:
    gate_up, grad = bf16(tokens, 2 * WIDE), bf16(tokens, WIDE)
    xas, shape = bf16(tokens, 2 * RANK), f"{tokens} x {WIDE}"
    pair, down_gb = (xas[:, :RANK], xas[:, RANK:]), bf16(tokens, RANK)
    silu = torch.nn.functional.silu
    yield Kernel(
        "SwiGLU", shape, lambda: gated.gated_forward(gate_up, WIDE, "silu"), 3 * 2 * tokens * WIDE,
        0, ("torch", lambda: silu(gate_up[:, :WIDE]) * gate_up[:, WIDE:]),
    )  # fmt: skip
    yield Kernel(
        "SwiGLU backward, with three LoRA gradients", shape,
        lambda: gated.gated_backward_(gate_up, grad, pair, down_gb, WIDE, "silu"),
        5 * 2 * tokens * WIDE,
    )  # fmt: skip


def rotary(tokens: int) -> Iterator[Kernel]:
    heads = HEADS + 2 * KV_HEADS
    qkv = bf16(tokens, heads, HEAD)
    cos, sin = (torch.rand(tokens, HEAD, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rotated = HEADS + KV_HEADS
    yield Kernel(
        "RoPE", f"{tokens} x {rotated} x {HEAD}", lambda: rope.rope_(qkv, cos, sin, rotated),
        2 * 2 * tokens * rotated * HEAD,
    )  # fmt: skip
    query, key, value = bf16(tokens, HEADS, HEAD), *(bf16(tokens, KV_HEADS, HEAD) for _ in "kv")
    out = bf16(tokens, heads * HEAD)
    yield Kernel(
        "RoPE backward", f"{tokens} x {heads} x {HEAD}",
        lambda: rope.rope_backward(query, key, value, cos, sin, out), 2 * 2 * out.numel(),
    )  # fmt: skip


def losses(tokens: int) -> Iterator[Kernel]:
    rows = min(tokens, 2048)
    logits = bf16(rows, VOCABULARY)
    labels = torch.randint(VOCABULARY, (tokens,), device="cuda")
    yield Kernel(
        "softmax loss and gradient in place", f"{rows} x {VOCABULARY}",
        lambda: softmax_loss.softmax_loss_(logits, labels[:rows]), 2 * 2 * logits.numel(),
    )  # fmt: skip
    hidden = bf16(tokens, HIDDEN).requires_grad_()
    head = bf16(VOCABULARY, HIDDEN) * 0.02
    yield Kernel(
        "head + cross-entropy, forward and backward", f"{tokens} x {VOCABULARY} x {HIDDEN}",
        lambda: torch.autograd.grad(
            linear_cross_entropy(hidden, head, labels, all_labelled=True), hidden
        ),
        0, 4.0 * tokens * VOCABULARY * HIDDEN,
    )  # fmt: skip


def optimizers(tokens: int) -> Iterator[Kernel]:
    param, grad = torch.randn(2, ADAPTERS, device="cuda")
    moments = [torch.zeros(ADAPTERS, device="cuda") for _ in range(2)]
    codes = [torch.zeros(ADAPTERS, device="cuda", dtype=torch.uint8) for _ in range(2)]
    codes += [torch.zeros(ADAPTERS // adamw.BLOCK_SIZE, device="cuda") for _ in range(2)]
    settings = {"step": 1, "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    settings |= {"weight_decay": 0.0, "grad_scale": 0.5}
    twins = dict.fromkeys((32, 8))
    if (bnb := bitsandbytes()) is not None:
        for bits in twins:
            theirs = torch.nn.Parameter(param.clone())
            theirs.grad = grad.clone()
            optimizer = getattr(bnb.optim, f"AdamW{bits}bit")([theirs])
            twins[bits] = ("bitsandbytes", optimizer.step)
    shape = f"{ADAPTERS / 1e6:.0f} M"
    yield Kernel(
        "AdamW, 32 bits", shape, lambda: adamw.adamw_step_(param, grad, *moments, **settings),
        28 * ADAPTERS, 0, twins[32],
    )  # fmt: skip
    yield Kernel(
        "AdamW, 8 bits", shape, lambda: adamw.adamw8bit_step_(param, grad, *codes, **settings),
        16 * ADAPTERS, 0, twins[8],
    )  # fmt: skip


def low_rank(tokens: int) -> Iterator[Kernel]:
    for columns, rank in ((HIDDEN, RANK), (HIDDEN, 3 * RANK), (WIDE, RANK)):
        x, factor, gb = bf16(tokens, columns), bf16(columns, rank), bf16(tokens, rank)
        out, shape = bf16(tokens, rank), f"{tokens} x {columns}, rank {rank}"
        yield Kernel(
            "skinny product x A^T", shape,
            lambda x=x, f=factor, o=out: skinny.rank_product_(o, x, f), 2 * tokens * columns, 0,
            ("torch", lambda x=x, f=factor: x @ f),
        )  # fmt: skip
        yield Kernel(
            "skinny gradient g^T x", shape, lambda x=x, g=gb: skinny.rank_gradient(g, x),
            2 * tokens * columns, 0, ("torch", lambda x=x, g=gb: g.T @ x),
        )  # fmt: skip


GROUPS = (four_bit, assembled, norms, gates, rotary, losses, optimizers, low_rank)


def microseconds(run: Callable[[], object], repeat_ms: int) -> float:
    return 1e3 * do_bench(run, warmup=10, rep=repeat_ms, return_mode="median")


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a CUDA graph of what was compiled and has its tables by then."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def limits() -> dict[str, float]:
    """Return bytes a second of a copy and operations a second of a product."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    x = bf16(8192, 8192)
    return {
        "bytes_per_second": 2 * 2**30 / microseconds(lambda: target.copy_(source), 100) * 1e6,
        "operations_per_second": 2 * 8192**3 / microseconds(lambda: x @ x, 100) * 1e6,
    }


def measured(kernel: Kernel, bounds: dict[str, float], repeat_ms: int) -> dict:
    ready = recorded if kernel.is_recorded else (lambda run: run)
    taken = microseconds(ready(kernel.run), repeat_ms)
    line = {"kernel": kernel.name, "shape": kernel.shape, "us": round(taken, 1)}
    if kernel.num_bytes:
        rate, bound = kernel.num_bytes / taken * 1e6, bounds["bytes_per_second"]
        line |= {"tb_per_second": round(rate / 1e12, 3)}
    else:
        rate, bound = kernel.num_operations / taken * 1e6, bounds["operations_per_second"]
        line |= {"tflop_per_second": round(rate / 1e12, 1)}
    line["of_limit"] = round(rate / bound, 3)
    if kernel.twin is not None:
        name, run = kernel.twin
        theirs = microseconds(ready(run), repeat_ms)
        line |= {"twin": name, "twin_us": round(theirs, 1), "speedup": round(theirs / taken, 2)}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeat-ms", type=int, default=50)
    parser.add_argument("--only", help="parts of kernels' names, with commas between")
    args = parser.parse_args()
    torch.manual_seed(0)
    bounds = limits()
    print(json.dumps({"kernel": "limits", **bounds}), flush=True)
    wanted = args.only.split(",") if args.only else [""]
    for group in GROUPS:
        try:
            for kernel in group(args.tokens):
                if any(part in kernel.name for part in wanted):
                    print(json.dumps(measured(kernel, bounds, args.repeat_ms)), flush=True)
        except Exception as error:  # noqa: BLE001 - a kernel that fails is a line, not the end
            said = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps({"kernel": group.__name__, "error": said}), flush=True)


if __name__ == "__main__":
    main()
