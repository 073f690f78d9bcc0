"""Predicted against measured peaks, on one GPU: random weights made in place, a few steps a run.

    python benchmarks/memory_plan.py --out memory_plan.json [--runs 0-3] [--steps 2]

Prints a JSON line a run: both peaks, their difference in percent and MB, and whether it is within
3 % or 100 MB. The measured peak is `max_memory_allocated` less what was there before the model.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from random_model import batch, random_model, release

from halfbyte.device import join_memory
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.names import OPTIMIZERS
from halfbyte.plan.predict import Planner, Setting
from halfbyte.train.loss import LanguageModel
from halfbyte.train.step import train_step

P32, P8 = "paged_adamw_32bit", "paged_adamw_8bit"
RUNS = [  # shape, rank, rows, length, memory ("auto", "lean", "fast" or GiB), optimizer
    ("llama1b", 8, 4, 1024, "auto", P32),
    ("llama1b", 64, 1, 8192, "lean", P8),
    ("llama1b", 8, 1, 32768, "auto", P32),
    ("llama8b", 8, 1, 1024, "fast", P32),
    ("llama8b", 8, 4, 2048, "lean", P8),
    ("llama8b", 64, 4, 2048, "auto", P32),
    ("llama8b", 64, 1, 8192, 6.0, P8),
    ("llama8b", 8, 1, 16384, "auto", P32),
    ("llama8b", 8, 1, 32768, "lean", P32),
    ("mistral7b", 64, 1, 4096, "fast", P32),
    ("mistral7b", 64, 1, 32768, "lean", P8),
    ("mistral7b", 8, 2, 8192, 8.0, P32),
    ("gemma2b", 8, 1, 1024, "auto", P32),
    ("gemma2b", 64, 1, 4096, "auto", P8),
    ("tiny", 8, 2, 1024, "auto", P32),
]


def measure(
    shape: str, rank: int, rows: int, length: int, memory, optim: str, steps: int, compute: str
) -> dict:  # fmt: skip
    device = torch.device("cuda")
    release()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    model = random_model(shape, device, rank=rank)
    torch.cuda.reset_peak_memory_stats()
    state_bits, is_paged = OPTIMIZERS[optim]
    spend = int(memory * 2**30) if isinstance(memory, float) else memory
    place = "host" if memory == "lean" else "auto"
    optimizer = AdamW(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        state_bits=state_bits, placement=place if is_paged else "device",
    )  # fmt: skip
    parts = LanguageModel.of(model, memory=spend, compute=compute)
    torch.cuda.reset_peak_memory_stats()
    setting = Setting(
        rows=rows, length=length, memory=spend, compute=compute, state_bits=state_bits,
        is_paged=is_paged, total_bytes=torch.cuda.mem_get_info()[1],
    )  # fmt: skip
    planned = time.perf_counter()
    predicted = Planner(model).predict(setting)
    planned = time.perf_counter() - planned
    vocabulary = model.config.vocab_size
    times = []
    for step in range(steps):
        data = [batch(rows, length, vocabulary)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        train_step(parts, optimizer, data, step=step, learning_rate=1e-4, max_grad_norm=1.0, seed=0)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    measured = torch.cuda.max_memory_allocated() - before
    reserved = torch.cuda.max_memory_reserved()
    difference = predicted.peak.nbytes - measured
    optimizer.release()
    return {
        "shape": shape, "rank": rank, "rows": rows, "length": length, "memory": memory,
        "optim": optim, "compute": compute, "fused": parts.is_fused,
        "predicted_gib": round(predicted.peak.nbytes / 2**30, 3),
        "measured_gib": round(measured / 2**30, 3),
        "difference_percent": round(100 * difference / measured, 2),
        "difference_mb": round(difference / 1e6),
        "within": abs(difference) <= max(0.03 * measured, 100e6),
        "moment": predicted.peak.moment, "kept": dict(predicted.kept),
        "owners_mib": {k: round(v / 2**20) for k, v in predicted.peak.owners.items()},
        "reserved_gib": round(reserved / 2**30, 3),
        "step_s": round(min(times), 3), "plan_s": round(planned, 2),
        "all_s": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", help="a range such as 0-3; by default all")
    parser.add_argument("--compute", default="bf16", choices=["bf16", "fp8"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    join_memory()  # as in training
    first, last = map(int, args.runs.split("-")) if args.runs else (0, len(RUNS) - 1)
    results = []
    for run in RUNS[first : last + 1]:
        try:
            result = measure(*run, args.steps, args.compute)
        except torch.OutOfMemoryError as error:
            result = {"shape": run[0], "run": run, "error": str(error)[:300]}
        results.append(result)
        print(json.dumps(result), flush=True)
    good = sum(bool(result.get("within")) for result in results)
    print(f"{good} of {len(results)} within 3 % or 100 MB")
    if args.out:
        machine = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
