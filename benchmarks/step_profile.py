"""Where a training step's time goes: each kind of kernel, its limit, and what the gap is made of.

    python benchmarks/step_profile.py --shape 4x2048 --memory auto          # profiles one step
    python benchmarks/step_profile.py --shape 4x2048 --from RESULT.json --key profile_4x2048_auto

Work is counted from the shape of the model: the fewest operations or bytes that a step without
recomputation needs, at the rates of a large product and of a large copy. The floor is the time of
the products, the attention and the loss at that rate; all else is gap. `--from` reads a profile
that was written before. Prints one JSON line and a Markdown table.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

# A large copy and a large bf16 product on an H100, where the profile was read from a file.
RATES = {"bytes_per_second": 3.02e12, "operations_per_second": 700e12}
# The first that matches names the kind. Products of a narrow tile or a split K are LoRA's.
KINDS = (
    ("LoRA's own products", r"nvjet\w*?_(?:16|32|64)x(?:8|16|32|64)_|splitK|rank_|skinny"),
    ("products", r"nvjet|gemm|cutlass|xmma"),
    ("attention", r"cudnn|flash|fmha"),
    ("to eight bits", r"_quantize_rows|_balances_kernel|_split_kernel"),
    ("RMSNorm", r"rms_norm"),
    ("SwiGLU", r"gated"),
    ("RoPE", r"rope"),
    ("softmax loss", r"softmax_loss"),
    ("dequantize", r"dequantize|assemble|fill|border|factors"),
    ("AdamW", r"adamw"),
    ("copies and sums", r"copy|memcpy|memset|elementwise|reduce|cat"),
)
OTHER = "other"


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama."""

    hidden: int = 4096
    wide: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    rank: int = 16

    @property
    def linear_parameters(self) -> int:
        """Weights of the seven projections of all layers."""
        keys = self.hidden * self.kv_heads // self.heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * keys + 3 * self.wide)

    @property
    def product_columns(self) -> int:
        """What the products of all layers read of a token, forward and backward."""
        qkv = self.hidden + 2 * self.hidden * self.kv_heads // self.heads
        return self.layers * (3 * self.hidden + self.wide + qkv + 2 * self.hidden + 2 * self.wide)

    @property
    def adapter_parameters(self) -> int:
        keys = self.hidden * self.kv_heads // self.heads
        sides = 2 * 2 * self.hidden + 2 * (self.hidden + keys) + 3 * (self.hidden + self.wide)
        return self.layers * self.rank * sides


def work(
    model: Model, rows: int, length: int, compute: str = "bf16"
) -> dict[str, tuple[float, float]]:
    """Return the operations and the bytes that each kind of kernel needs at least.

    An operation in eight bits counts as a half: a card does twice as many.
    """
    is_fp8 = compute == "fp8"
    tokens, hidden, layers = rows * length, model.hidden, model.layers
    head = 2 * 2 * tokens * model.vocabulary * hidden
    tensor, wide = 2 * tokens * hidden, 2 * tokens * model.wide
    heads = (model.heads + 2 * model.kv_heads) / model.heads
    causal = 2 * rows * length**2 * hidden * layers
    return {
        # Forward and the gradient of the input; the weights are frozen.
        "products": (2 * 2 * tokens * model.linear_parameters / (1 + is_fp8) + head, 0),
        "to eight bits": (0, is_fp8 * 3 * tokens * model.product_columns),
        "attention": (3.5 * causal, 0),
        # Two norms a layer read two tensors and write two, forward and backward.
        "RMSNorm": (0, layers * 2 * 2 * 4 * tensor),
        "SwiGLU": (0, layers * (3 + 5) * wide),
        "RoPE": (0, layers * 2 * 2 * heads * tensor),
        "softmax loss": (0, 2 * 2 * tokens * model.vocabulary),
        # x of three groups and of down, read by A's products and again by A's gradients.
        "LoRA's own products": (0, layers * 2 * (3 * tensor + wide)),
        "AdamW": (0, 28 * model.adapter_parameters),
    }


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), OTHER)


def analysis(kernels: list[dict], step_ms: float, needs: dict, rates: dict) -> dict:
    """Return, by kind, milliseconds, share, milliseconds at the limit, and the gap."""
    taken: dict[str, float] = {}
    for kernel in kernels:
        kind = kind_of(kernel["kernel"])
        taken[kind] = taken.get(kind, 0.0) + kernel["ms"]
    lines = []
    for kind, ms in sorted(taken.items(), key=lambda item: -item[1]):
        operations, moved = needs.get(kind, (0, 0))
        least = 1e3 * max(
            operations / rates["operations_per_second"], moved / rates["bytes_per_second"]
        )
        lines.append({
            "kind": kind, "ms": round(ms, 1), "percent": round(100 * ms / step_ms, 1),
            "least_ms": round(least, 1), "of_limit": round(least / ms, 2) if least else None,
        })  # fmt: skip
    floor = 1e3 * sum(needs[kind][0] for kind in ("products", "attention"))
    floor /= rates["operations_per_second"]
    return {
        "case": "step_profile", "step_ms": round(step_ms, 1), "floor_ms": round(floor, 1),
        "of_floor": round(floor / step_ms, 3), "kinds": lines,
        "no_kernel_ms": round(step_ms - sum(taken.values()), 1),
        "rates": {name: float(f"{rate:.4g}") for name, rate in rates.items()},
    }  # fmt: skip


def table(found: dict) -> str:
    lines = ["| kind | ms | of the step | least, ms | of its limit |", "|---|---:|---:|---:|---:|"]
    for row in found["kinds"]:
        limit = "" if row["of_limit"] is None else f"{100 * row['of_limit']:.0f} %"
        lines.append(
            f"| {row['kind']} | {row['ms']} | {row['percent']} % | {row['least_ms']} | {limit} |"
        )
    lines.append(f"| no kernel (overlap where negative) | {found['no_kernel_ms']} | | | |")
    lines.append(f"| the step | {found['step_ms']} | | {found['floor_ms']} (floor) | "
                 f"{100 * found['of_floor']:.0f} % |")  # fmt: skip
    return "\n".join(lines)


def profiled(shape: str, memory: str, compute: str) -> tuple[list[dict], float, dict]:
    """Return the kernels of one step, its milliseconds without profiler, and the card's rates."""
    import gpu_step
    import kernels_gpu
    import torch

    import halfbyte as hb
    from halfbyte.optim.adamw import AdamW
    from halfbyte.train.loss import LanguageModel
    from halfbyte.train.step import train_step

    rates = kernels_gpu.limits()
    torch.cuda.empty_cache()
    model = gpu_step.random_model("llama8b", torch.device("cuda"))
    model = hb.add_lora(model, hb.LoraConfig(r=16, lora_alpha=32)).train()
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-4)
    timed = gpu_step.measure(model, optimizer, memory, shape, 5, [], 0.0, compute)
    language_model = LanguageModel.of(model, memory=memory, compute=compute)
    data = gpu_step.batches_of(shape, [], model.config.vocab_size, 0)

    def step(number: int) -> None:
        train_step(
            language_model, optimizer, data, step=number, learning_rate=1e-4, max_grad_norm=1.0,
            seed=0,
        )  # fmt: skip
        torch.cuda.synchronize()

    for number in range(2):
        step(number)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step(2)
    kernels = [
        {"kernel": event.key, "ms": event.self_device_time_total / 1e3, "launches": event.count}
        for event in trace.key_averages()
    ]
    return kernels, timed["step_ms"], rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4x2048")
    parser.add_argument("--memory", default="auto", help="auto or fast: nothing is recomputed")
    parser.add_argument("--compute", default="bf16", choices=["bf16", "fp8"])
    parser.add_argument("--from", dest="source", type=Path, help="a result with a profile")
    parser.add_argument("--key", default="profile_4x2048_auto")
    args = parser.parse_args()
    if args.source is None:
        kernels, step_ms, rates = profiled(args.shape, args.memory, args.compute)
    else:
        before = json.loads(args.source.read_text(encoding="utf-8"))[args.key]
        kernels, step_ms, rates = before["kernels"], before["step_ms"], RATES
    rows, length = map(int, args.shape.split("x"))
    found = analysis(kernels, step_ms, work(Model(), rows, length, args.compute), rates)
    print(json.dumps(found), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
