"""The paged optimizer on one GPU: it trains where the unpaged one fails, and what it costs.

    python benchmarks/paging.py --out paging.json [--shape llama1b] [--cost-shape llama8b]

Part 1: a run without pressure is measured; then a ballast tensor leaves less than it needed, by
more than half of the optimizer's state. Unpaged runs out of memory; paged does 20 steps. The
parameters must be bitwise those of the run without pressure (deterministic attention for both).
Part 2: milliseconds of an update and of a step: unpaged, paged with all pages on the GPU, paged
with all of them on the host.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from random_model import batch, random_model, release

from halfbyte.errors import DeviceError
from halfbyte.memory.shortage import is_out_of_memory
from halfbyte.optim.adamw import AdamW
from halfbyte.train.determinism import determinism
from halfbyte.train.loss import LanguageModel
from halfbyte.train.step import train_step
from halfbyte.train.survive import Survivor

STEPS = 20
LENGTH = 512


def named(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def data(step: int, vocabulary: int, rows: int = 1, length: int = LENGTH):
    torch.manual_seed(1000 + step)
    return [batch(rows, length, vocabulary)]


def run(shape: str, rank: int, state_bits: int, *, placement: str, ballast_bytes: int = 0) -> dict:
    """Train 20 steps; return the parameters on the host, the peaks and what was given up."""
    release()
    ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device="cuda")
    base = torch.cuda.memory_reserved()
    model = random_model(shape, torch.device("cuda"), rank=rank)
    told = []
    optimizer = AdamW(named(model), lr=1e-3, state_bits=state_bits, placement=placement)
    parts = LanguageModel.of(model, memory="lean")
    settings = dict(learning_rate=1e-3, max_grad_norm=1.0, seed=0)
    survivor = Survivor(parts, optimizer, tell=told.append, explain=lambda s: DeviceError(s.reason))
    for step in range(STEPS):
        batches = data(step, model.config.vocab_size)
        if placement == "auto":
            survivor.step(batches, step=step, **settings)
        else:
            train_step(parts, optimizer, batches, step=step, **settings)
    found = {
        "parameters": {n: p.detach().cpu() for n, p in named(model)},
        "reserved": torch.cuda.max_memory_reserved() - base,
        "state_bytes": optimizer.resident_bytes + optimizer.host_bytes,
        "host_bytes": optimizer.host_bytes,
        "measures": [measure for event in told for measure in event.measures],
    }
    optimizer.release()
    del ballast
    return found


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a["parameters"][n], b["parameters"][n]) for n in a["parameters"])


def prove(shape: str, rank: int, state_bits: int) -> dict:
    free_run = run(shape, rank, state_bits, placement="device")
    control = run(shape, rank, state_bits, placement="device")
    release()
    free, _ = torch.cuda.mem_get_info()
    room = free_run["reserved"] - int(0.6 * free_run["state_bytes"])
    ballast = free - room
    failure = None
    try:
        run(shape, rank, state_bits, placement="device", ballast_bytes=ballast)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failure = str(error).partition("\n")[0]
    release()
    squeezed = run(shape, rank, state_bits, placement="auto", ballast_bytes=ballast)
    return {
        "shape": shape, "rank": rank, "state_bits": state_bits, "steps": STEPS,
        "state_mib": round(free_run["state_bytes"] / 2**20),
        "unsqueezed_reserved_gib": round(free_run["reserved"] / 2**30, 3),
        "room_gib": round(room / 2**30, 3), "ballast_gib": round(ballast / 2**30, 2),
        "unpaged": failure or "DID NOT FAIL",
        "paged_measures": squeezed["measures"],
        "paged_host_mib": round(squeezed["host_bytes"] / 2**20),
        "two_free_runs_bitwise_equal": equal(free_run, control),
        "squeezed_bitwise_equal": equal(free_run, squeezed),
    }  # fmt: skip


def timed(function, count: int) -> float:
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def cost(shape: str, rank: int, state_bits: int, rows: int, length: int) -> list[dict]:
    found = []
    kinds = {"unpaged": "device", "paged, on the GPU": "auto", "paged, on the host": "host"}
    for name, placement in kinds.items():
        release()
        model = random_model(shape, torch.device("cuda"), rank=rank)
        optimizer = AdamW(named(model), lr=1e-4, state_bits=state_bits, placement=placement)
        parts = LanguageModel.of(model, memory="fast")
        batches = data(0, model.config.vocab_size, rows, length)

        def step(parts=parts, optimizer=optimizer, batches=batches) -> None:
            train_step(
                parts, optimizer, batches, step=0, learning_rate=1e-4, max_grad_norm=1.0, seed=0
            )

        step_ms = timed(step, 8)
        found.append({
            "shape": shape, "rank": rank, "state_bits": state_bits, "case": f"{rows}x{length}",
            "optimizer": name,
            "update_ms": round(timed(lambda o=optimizer: o.step(1e-4), 12), 3),
            "step_ms": round(step_ms, 2),
            "state_mib": round((optimizer.resident_bytes + optimizer.host_bytes) / 2**20),
        })  # fmt: skip
        optimizer.release()
        del model, optimizer, parts, step
    first = found[0]
    for other in found[1:]:
        other["step_percent"] = round(100 * (other["step_ms"] / first["step_ms"] - 1), 2)
        other["update_percent_of_step"] = round(
            100 * (other["update_ms"] - first["update_ms"]) / first["step_ms"], 2
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama1b")
    parser.add_argument("--cost-shape", default="llama8b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, list] = {"proof": [], "cost": []}
    machine = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}

    def add(key: str, line: dict) -> None:
        results[key].append(line)
        print(json.dumps(line), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")

    with determinism(enabled=True):
        for state_bits in (32, 8):
            add("proof", prove(args.shape, args.rank, state_bits))
    for state_bits in (32, 8):
        for line in cost(args.cost_shape, args.rank, state_bits, 2, 1024):
            add("cost", line)


if __name__ == "__main__":
    main()
