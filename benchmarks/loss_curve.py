"""Fifty steps of training: Halfbyte beside transformers + bitsandbytes + peft, step by step.

    python benchmarks/loss_curve.py --shape demo --device cpu --plot loss_curve.svg
    python benchmarks/loss_curve.py --shape llama1b --device cuda

All start from one bf16 checkpoint, quantized by each contestant itself (the codes are compared),
with one LoRA initialisation, the same batches in the same order, AdamW with 32-bit state and
clipping. What differs is rounding. Its yardstick is a second run of the peer with another order of
summation: the attention of transformers' "eager" instead of "sdpa". On a GPU that has it, Halfbyte
runs with `compute: fp8` too, which is compared with itself in bf16 as well. Prints one JSON line:
every loss, and the largest and mean difference from the peer.
"""

import argparse
import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import peft
import torch
from random_checkpoint import SHAPES, write
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import halfbyte as hb
from halfbyte.config import resolve_model
from halfbyte.data.loader import Batch
from halfbyte.optim.adamw import AdamW
from halfbyte.quant.linear import NF4Linear
from halfbyte.train.loss import LanguageModel
from halfbyte.train.step import train_step

ROWS, LENGTH, STEPS = 4, 64, 50
OURS, OURS_FP8, PEER = "halfbyte, auto", "halfbyte, fp8", "peer, sdpa"
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 16, "lora_alpha": 32, "target_modules": SEVEN, "task_type": "CAUSAL_LM"}
COLOURS = ("#1f77b4", "#2ca02c", "#9467bd", "#d62728", "#ff9896")


def batches(steps: int, vocabulary: int) -> list[torch.Tensor]:
    """Return `[ROWS, LENGTH]` tokens a step: each follows from the one before, 9 times in 10."""
    generator = torch.Generator().manual_seed(0)
    known = min(64, vocabulary)
    successor = torch.randperm(known, generator=generator)
    found = []
    for _ in range(steps):
        ids = torch.randint(known, (ROWS, LENGTH), generator=generator)
        follows = torch.rand(ROWS, LENGTH, generator=generator) < 0.9
        for column in range(1, LENGTH):
            ids[:, column] = torch.where(
                follows[:, column], successor[ids[:, column - 1]], ids[:, column]
            )
        found.append(ids)
    return found


def ours(folder: Path, device: str):
    model, _ = hb.load(folder, device=device, dtype=torch.bfloat16)
    return hb.add_lora(model, hb.LoraConfig(**LORA), seed=0).train()


def our_losses(model, memory: str, compute: str, data: list[torch.Tensor]) -> list[float]:
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    language_model = LanguageModel.of(model, memory=memory, compute=compute)
    losses = []
    for step, ids in enumerate(data):
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
        batch = Batch(ids, ids, positions, None, ROWS * (LENGTH - 1), ROWS * LENGTH)
        result = train_step(
            language_model, optimizer, [batch], step=step, learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM, seed=0,
        )  # fmt: skip
        losses.append(result.loss)
    return losses


def peer(folder: Path, device: str, attention: str, start: dict[str, torch.Tensor]):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": device},
        attn_implementation=attention,
    )  # fmt: skip
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    return model


def peer_losses(model, device: str, data: list[torch.Tensor]) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for ids in data:
        ids = ids.to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_codes(ours, theirs) -> bool:
    """Whether both quantized every weight to the same bytes."""
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, NF4Linear)}
    return all(
        torch.equal(m.weight.flatten(), theirs.get_submodule(n).weight.flatten())
        for n, m in layers.items()
    )


def trained(folder: Path, device: str, steps: int) -> tuple[dict[str, list[float]], bool]:
    """Return each contestant's losses, and whether the 4-bit weights are the same."""
    losses = {}
    runs = {OURS: ("auto", "bf16"), "halfbyte, lean": ("lean", "bf16")}
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        runs[OURS_FP8] = ("auto", "fp8")
    for name, (memory, compute) in runs.items():
        model = ours(folder, device)
        data = batches(steps, model.config.vocab_size)
        start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        losses[name] = our_losses(model, memory, compute, data)
    equal = True
    for attention in ("sdpa", "eager"):
        theirs = peer(folder, device, attention, start)
        equal = equal and same_codes(model, theirs)
        losses[f"peer, {attention}"] = peer_losses(theirs, device, data)
    return losses, equal


def differences(losses: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return how far each run is from the peer's, and fp8 from bf16, in nats a token."""
    found = {name: apart(losses, name, PEER) for name in losses if name != PEER}
    if OURS_FP8 in losses:
        found[f"{OURS_FP8}, from bf16"] = apart(losses, OURS_FP8, OURS)
    return found


def apart(losses: dict[str, list[float]], name: str, other: str) -> dict[str, float]:
    between = torch.tensor(losses[name]) - torch.tensor(losses[other])
    return {
        "max": round(between.abs().max().item(), 5), "mean": round(between.abs().mean().item(), 5),
        "last": round(between[-1].item(), 5),
    }  # fmt: skip


def drawing(losses: dict[str, list[float]]) -> str:
    """Return the curves as SVG."""
    width, height, left, top = 640, 360, 50, 20
    every = [value for values in losses.values() for value in values]
    low, high, last = min(every), max(every), max(len(v) for v in losses.values()) - 1

    def x(step: float) -> float:
        return left + step / last * (width - left - 10)

    def y(loss: float) -> float:
        return top + (high - loss) / (high - low or 1) * (height - top - 40)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for part in range(5):
        loss, step = low + part / 4 * (high - low), round(part / 4 * last)
        lines.append(f'<text x="8" y="{y(loss) + 4:.1f}">{loss:.2f}</text>')
        lines.append(f'<text x="{x(step):.1f}" y="{height - 22}">{step + 1}</text>')
    lines.append(f'<text x="{width / 2:.0f}" y="{height - 6}">step</text>')
    for index, (name, values) in enumerate(losses.items()):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        colour = COLOURS[index % len(COLOURS)]
        dashes = "" if name.startswith("peer") else ' stroke-dasharray="6 4"'
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}"{dashes}/>')
        lines.append(
            f'<text x="{width - 150}" y="{top + 16 * (index + 1)}" fill="{colour}">{name}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--plot", type=Path, help="write the curves to this SVG file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if args.shape == "demo":
            shutil.copytree(resolve_model("demo"), folder)
        else:
            write(folder, args.shape)
        losses, equal = trained(folder, args.device, args.steps)
    line = {
        "case": "loss_curve", "shape": args.shape, "device": args.device, "steps": args.steps,
        "same_codes": equal, "first": round(losses[PEER][0], 4),
        "last": round(losses[PEER][-1], 4), "differences": differences(losses),
        "losses": {name: [round(v, 5) for v in values] for name, values in losses.items()},
    }  # fmt: skip
    if args.plot is not None:
        with contextlib.suppress(FileExistsError):
            args.plot.parent.mkdir(parents=True)
        args.plot.write_text(drawing(losses), encoding="utf-8")
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
