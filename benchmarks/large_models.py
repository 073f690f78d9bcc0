"""Large models on a card held to less memory: do they train, how fast, and up to which length.

    python benchmarks/large_models.py --out large.json [--only llama65b] [--longest 50000]

The cap is hard: the allocator may take the card's size less CUDA's context, and not a byte more.
Weights are random and in 4 bits; rank 64 on all linear layers for 33B and more, as in the QLoRA
paper, and 32 for 8B and 70B, as in the peers' published maxima.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from random_model import batch, random_model, release

from halfbyte.device import join_memory
from halfbyte.errors import DeviceError
from halfbyte.optim.adamw import AdamW
from halfbyte.plan.cards import CONTEXT_BYTES
from halfbyte.plan.fit import max_tokens
from halfbyte.plan.predict import Planner, Setting
from halfbyte.train.loss import LanguageModel
from halfbyte.train.survive import Survivor

CASES = [  # shape, rank, card in GiB, sequence to time, longest that peers publish
    ("llama65b", 64, 48, 2048, None),
    ("llama70b", 64, 48, 2048, 12106),
    ("llama70b", 32, 48, 2048, 12106),
    ("llama33b", 64, 24, 1024, None),
    ("llama8b", 32, 8, 1024, 2972),
    ("llama8b", 32, 24, 8192, 78475),
    ("llama8b", 32, 80, 8192, 342733),
]


def cap(gib: float) -> int:
    """Hold this process to a card of `gib`, and return the bytes that tensors may take."""
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = int(gib * 2**30) - CONTEXT_BYTES
    torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0))
    return allowed


def steps(survivor: Survivor, vocabulary: int, length: int, count: int) -> dict:
    """Do some steps of one sequence; the first one warms up."""
    torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for step in range(count):
        data = [batch(1, length, vocabulary)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = survivor.step(data, step=step, learning_rate=1e-4, max_grad_norm=1.0, seed=0)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(round(result.loss, 3))
    seconds = min(times[1:] or times)
    return {
        "length": length, "tokens_per_second": round(length / seconds),
        "step_s": round(seconds, 3), "losses": losses,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }  # fmt: skip


def longest(survivor: Survivor, vocabulary: int, guess: int) -> dict:
    """Do one step at the longest length that fits, from the plan's guess downwards."""
    refused = []
    for share in (1.0, 0.97, 0.94, 0.9, 0.85, 0.8):
        length = int(guess * share) // 32 * 32
        try:
            return {"refused": refused, **steps(survivor, vocabulary, length, 1)}
        except DeviceError as error:
            refused.append({"length": length, "why": error.message[:160]})
            release()
    return {"refused": refused}


def measure(
    shape: str, rank: int, gib: int, length: int, peers: int | None, *, longest_tokens: int | None
) -> dict:
    release()
    allowed = cap(gib)
    start = time.perf_counter()
    model = random_model(shape, torch.device("cuda"), rank=rank)
    optimizer = AdamW(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], placement="host"
    )
    told: list = []
    survivor = Survivor(
        LanguageModel.of(model, memory="lean"), optimizer, tell=told.append,
        explain=lambda shortage: DeviceError(shortage.reason),
    )  # fmt: skip
    made = time.perf_counter() - start
    planner = Planner(model)
    setting = Setting(length=length, memory="lean", total_bytes=gib * 2**30)
    predicted = planner.predict(setting)
    guess = max_tokens(planner, replace(setting, rows=1), gib * 2**30)
    vocabulary = model.config.vocab_size
    found = {
        "shape": shape, "rank": rank, "card_gib": gib, "allowed_gib": round(allowed / 2**30, 2),
        "made_s": round(made, 1),
        "predicted_peak_gib": round(predicted.peak.nbytes / 2**30, 2),
        "fits_by_plan": predicted.fits,
    }  # fmt: skip
    try:
        found["timed"] = steps(survivor, vocabulary, length, 3)
        found["longest_by_plan"] = guess
        guess = min(guess, longest_tokens or guess)
        found["longest"] = longest(survivor, vocabulary, guess) if guess else {}
    except DeviceError as error:
        found["error"] = error.message
    found["longest_of_peers"] = peers
    found["paged_host_gib"] = round(optimizer.host_bytes / 2**30, 2)
    found["measures"] = [measure for event in told for measure in event.measures]
    optimizer.release()
    torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="shapes, with commas between")
    parser.add_argument(
        "--longest", type=int, help="try no longer sequence: 342,784 tokens of 8B take five minutes"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    join_memory()  # as in training
    results = []
    machine = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    for case in CASES:
        if args.only is None or case[0] in args.only.split(","):
            results.append(measure(*case, longest_tokens=args.longest))
            print(json.dumps(results[-1]), flush=True)
        if args.out:
            found = {"machine": machine, "results": results}
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
