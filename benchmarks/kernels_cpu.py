"""The CPU kernels, beside plain torch and bitsandbytes, in elements per second.

    python benchmarks/kernels_cpu.py [--threads 2] [--repeats 20]

Prints one JSON line a case: the median and the best of the repeats, in units of 1e9 elements a
second. Contestants take turns, so that a busy machine is busy for all of them.
"""

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from halfbyte.kernels import adamw, codebooks, native, nf4, nf4_cpu
from halfbyte.kernels.cross_entropy import linear_cross_entropy

SHAPE = (3072, 768)
HEAD = (32000, 768)
ROWS = 1024
STATE = 2**22

Contestants = dict[str, Callable[[], Any]]


def dequantize_cases(weight: torch.Tensor) -> Contestants:
    """Double-quantized NF4 of `weight` back to its dtype."""
    packed, absmax = nf4.quantize_4bit(weight)
    codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
    scales = (codes, nested_absmax, codebooks.dynamic_map(), offset)
    form = {"shape": weight.shape, "dtype": weight.dtype}
    cases: Contestants = {
        "halfbyte": lambda: nf4.dequantize_nested(packed, *scales, **form),
        "without compiler": lambda: nf4_cpu.torch_dequantize_4bit(
            packed, nf4.dequantize_absmax(*scales), **form
        ),
        "reference": lambda: nf4.reference_dequantize_nested(packed, *scales, **form),
    }
    bnb = bitsandbytes()
    if bnb:
        theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        cases["bitsandbytes"] = lambda: bnb.dequantize_4bit(theirs, state)
    return cases


def quantize_cases(weight: torch.Tensor) -> Contestants:
    """`weight` to double-quantized NF4."""
    cases: Contestants = {
        "halfbyte": lambda: nf4.quantize_absmax(nf4.quantize_4bit(weight)[1]),
        "without compiler": lambda: nf4.quantize_absmax(nf4.reference_quantize_4bit(weight)[1]),
    }
    bnb = bitsandbytes()
    if bnb:
        cases["bitsandbytes"] = lambda: bnb.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True
        )
    return cases


def cross_entropy_cases() -> Contestants:
    """Loss and gradient of the hidden states, in logits a second."""
    hidden = torch.randn(ROWS, HEAD[1]).bfloat16().requires_grad_()
    head = (torch.randn(HEAD) * 0.02).bfloat16()
    labels = torch.randint(0, HEAD[0], (ROWS,))

    def plain() -> None:
        logits = torch.nn.functional.linear(hidden, head).float()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()

    return {
        "halfbyte": lambda: linear_cross_entropy(hidden, head, labels).backward(),
        "plain torch": plain,
    }


def adamw_cases() -> Contestants:
    """One update of a flat state, in parameters a second."""
    param, grad = torch.randn(2, STATE)
    wide = [torch.zeros(STATE) for _ in range(2)]
    narrow = [torch.zeros(STATE, dtype=torch.uint8) for _ in range(2)]
    narrow += [torch.zeros(STATE // adamw.BLOCK_SIZE) for _ in range(2)]
    settings = {"step": 1, "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    settings |= {"weight_decay": 0.0, "grad_scale": 0.5}
    return {
        "32 bit": lambda: adamw.adamw_step_(param, grad, *wide, **settings),
        "8 bit": lambda: adamw.adamw8bit_step_(param, grad, *narrow, **settings),
        "8 bit without compiler": lambda: inspect.unwrap(adamw.adamw8bit_step_)(
            param, grad, *narrow, **settings
        ),
    }


def bitsandbytes() -> Any:
    """Return bitsandbytes.functional, or None where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError:
        return None
    return bitsandbytes.functional


def measure(cases: Contestants, elements: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return each contestant's median and best rate, 1e9 elements a second."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "median": round(elements / statistics.median(times) / 1e9, 4),
            "best": round(elements / min(times) / 1e9, 4),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    weights = {
        str(dtype): torch.randn(SHAPE).to(dtype) for dtype in (torch.bfloat16, torch.float32)
    }
    cases = {f"dequantize {name}": (dequantize_cases(w), w.numel()) for name, w in weights.items()}
    cases |= {f"quantize {name}": (quantize_cases(w), w.numel()) for name, w in weights.items()}
    cases["linear cross-entropy bfloat16"] = (cross_entropy_cases(), ROWS * HEAD[0])
    cases["adamw"] = (adamw_cases(), STATE)
    machine = {"threads": arguments.threads, "compiled": native.library() is not None}
    for name, (contestants, elements) in cases.items():
        rates = measure(contestants, elements, arguments.repeats)
        print(json.dumps({"case": name, **machine, "rates": rates}), flush=True)


if __name__ == "__main__":
    main()
