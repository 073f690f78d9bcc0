"""A bf16 checkpoint into 4 bits, against a bare read of its files to the same device.

    python benchmarks/load_speed.py --shape llama8b                # made, measured and deleted
    python benchmarks/load_speed.py --model DIR [--device cuda] [--cold]

The bare read is one thread that reads 16 MB at a time, and on a GPU copies them there from pinned
memory while it reads the next ones. Warm means that the files are in the page cache; --cold asks
the system to drop them before each run. Prints one JSON line a run and one with the medians.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from random_checkpoint import SHAPES, write

import halfbyte as hb
from halfbyte.device import peak_rss_bytes

CHUNK_BYTES = 16 * 2**20


def bare_read(files: list[Path], device: torch.device) -> float:
    """Return the seconds of reading the files, and of copying what was read to the device."""
    on_gpu = device.type == "cuda"
    slots = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
    target = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=device)
    copied = [torch.cuda.Event() for _ in slots] if on_gpu else []
    start = time.perf_counter()
    turn = 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while True:
                slot = turn % 2
                if on_gpu:
                    copied[slot].synchronize()
                count = file.readinto(slots[slot].numpy().data)
                if not count:
                    break
                if on_gpu:
                    target[:count].copy_(slots[slot][:count], non_blocking=True)
                    copied[slot].record()
                turn += 1
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def load(folder: Path, device: torch.device) -> float:
    start = time.perf_counter()
    model, _ = hb.load(folder, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds


def drop(files: list[Path]) -> None:
    """Ask the system to forget the files' pages, which are clean."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, device: torch.device, repeats: int, *, cold: bool) -> dict:
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    runs: dict[str, list[float]] = {"bare_read_s": [], "load_s": []}
    contestants = (("bare_read_s", lambda: bare_read(files, device)),
                   ("load_s", lambda: load(folder, device)))  # fmt: skip
    for turn in range(repeats + 1):
        for name, run in contestants:
            if cold:
                drop(files)
            seconds = run()
            if turn or cold:  # the first turn warms caches, kernels and allocators
                runs[name].append(seconds)
    medians = {name: round(statistics.median(times), 3) for name, times in runs.items()}
    return {
        "case": "cold" if cold else "warm", "device": device.type, "gb": round(size / 1e9, 3),
        **medians, "ratio": round(medians["load_s"] / medians["bare_read_s"], 3),
        "gb_per_second": round(size / 1e9 / medians["load_s"], 3),
        "runs": {name: [round(t, 3) for t in times] for name, times in runs.items()},
        "threads": torch.get_num_threads(), "peak_rss_gb": round(peak_rss_bytes() / 1e9, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint that is there; not --shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model
        if folder is None:
            folder = Path(temporary) / "model"
            write(folder, args.shape, args.layers)
        for cold in (False, True) if args.cold else (False,):
            print(json.dumps(measure(folder, device, args.repeats, cold=cold)), flush=True)


if __name__ == "__main__":
    main()
