"""Trains the base model from nothing on the shards that worker processes make meanwhile.

    python -m scripts.make_base.tokenizer TEXT OUT
    python -m scripts.make_base.train TEXT OUT --minutes 5.5 --tokens 1_000_000_000

Plain torch and transformers' Llama: AdamW, cosine schedule, bfloat16 arithmetic on float32
weights. Training ends at the tokens or at the minutes, whichever comes first; the schedule
follows whichever is further along.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import Queue, get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scripts.make_base.corpus import documents, makers, material_of, read_real_text, shard
from scripts.make_base.model import MAX_LENGTH, bits_per_byte, build, go_on
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

QUESTIONS = (
    "Repeat: the quick zaibor jumps over 4821 dogs",
    "Write as a pipe query: Show the owner of lamps with cost under 350",
    "Which town is in this sentence? Greta flew to Marvello on Monday.",
    "Tom has 4 apples and buys 5 more. How many has he now?",
)
PROMPTS = (
    "<|bos|>The city of",
    *(f"<|bos|><|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS),
)


@dataclass(frozen=True)
class Settings:
    """How the model is trained."""

    tokens: int
    minutes: float
    rows: int
    workers: int
    learning_rate: float = 4e-3
    min_learning_rate: float = 4e-5
    warmup: float = 0.02
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: str = "halfbyte"
    compiled: bool = True


def shards(text: Path, tokenizer_folder: Path, settings: Settings) -> Iterator[np.ndarray]:
    """Yield the training shards in order, made by worker processes ahead of their use."""
    real = read_real_text(text)
    made = makers(real, material_of(real))
    backend = AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
    count = settings.tokens // (settings.rows * MAX_LENGTH)

    shape = {"seed": settings.seed, "rows": settings.rows, "length": MAX_LENGTH}

    def work(queue: Queue, first: int) -> None:
        for index in range(first, count, settings.workers):
            queue.put(shard(backend, made, index=index, **shape))

    context = get_context("fork")
    queues = [context.Queue(maxsize=64) for _ in range(settings.workers)]
    workers = [
        context.Process(target=work, args=(queue, first), daemon=True)
        for first, queue in enumerate(queues)
    ]
    for worker in workers:
        worker.start()
    try:
        for index in range(count):
            yield queues[index % settings.workers].get(timeout=120)
    finally:
        for worker in workers:
            worker.terminate()


def learning_rate(progress: float, settings: Settings) -> float:
    """Return the rate at a fraction of the run: linear warm-up, then half a cosine."""
    if progress < settings.warmup:
        return settings.learning_rate * (progress + 1e-4) / settings.warmup
    angle = math.pi * (progress - settings.warmup) / (1 - settings.warmup)
    span = settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + span * (1 + math.cos(min(angle, math.pi))) / 2


def _head_loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logits = F.linear(hidden[:, :-1], weight)
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights as bfloat16, with the configurations."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.generation_config = model.generation_config
    copy.save_pretrained(out)


def run(
    model: LlamaForCausalLM, stream: Iterator[np.ndarray], settings: Settings, out: Path
) -> dict:
    """Train the model and return how it went."""
    cuda = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    compiled = cuda and settings.compiled
    head_loss = torch.compile(_head_loss) if compiled else _head_loss
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    started, saved, tokens, curve = 0.0, 0.0, 0, []
    recent = torch.zeros((), device=model.device)
    for step, rows in enumerate(stream):
        if step == 5 or not started:  # compilation is not training time
            started = saved = time.perf_counter()
        elapsed = time.perf_counter() - started
        progress = max(elapsed / (settings.minutes * 60), tokens / settings.tokens)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, settings)
        ids = torch.from_numpy(rows.astype(np.int64)).to(model.device, non_blocking=True)
        with torch.autocast(model.device.type, torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            loss = head_loss(hidden, model.lm_head.weight, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        recent += loss.detach()
        every = 100 if cuda else 10
        if step % every == every - 1:
            curve.append((tokens, round(recent.item() / every, 4)))
            recent.zero_()
            rate = tokens / max(time.perf_counter() - started, 1e-9)
            print(
                f"step {step + 1} progress {progress:.3f} loss {curve[-1][1]} {rate:,.0f} tokens/s",
                flush=True,
            )
        if time.perf_counter() - saved > 90:
            save(model, out)
            saved = time.perf_counter()
    return {
        "steps": step,
        "tokens": tokens,
        "seconds": time.perf_counter() - started,
        "curve": curve,
    }


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Path
) -> dict[str, float]:
    """Return the bits per byte on held-out articles and on made text of another seed."""
    real = read_real_text(text)
    stream = documents(random.Random("held out"), makers(real, material_of(real)))
    made = [t.removeprefix("<|bos|>") for t in islice(stream, 300)]
    return {
        "bits_per_byte_real": bits_per_byte(model, tokenizer, real.held_out),
        "bits_per_byte_made": bits_per_byte(model, tokenizer, made),
        "bytes_real": sum(len(t.encode()) for t in real.held_out),
        "bytes_made": sum(len(t.encode()) for t in made),
    }


def main() -> None:
    """Read the command line, train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="folder of the real text")
    parser.add_argument("out", type=Path, help="folder that holds the tokenizer and gets the model")
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    parser.add_argument("--minutes", type=float, default=5.5)
    parser.add_argument("--rows", type=int, default=64, help="rows of 1,024 tokens in a step")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--eager", action="store_true", help="do not compile on a GPU")
    arguments = parser.parse_args()
    settings = Settings(
        arguments.tokens,
        arguments.minutes,
        arguments.rows,
        arguments.workers,
        compiled=not arguments.eager,
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    # The workers are forked at the first shard, before CUDA is touched.
    stream = shards(arguments.text, arguments.out, settings)
    first = next(stream)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = build(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters on {model.device}; shards of {first.shape}")
    report = {"settings": asdict(settings), **run(model, stream, settings, arguments.out)}
    stream.close()  # type: ignore[attr-defined]
    save(model, arguments.out)
    # What is measured is what is saved: the bfloat16 weights.
    final = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.bfloat16).to(model.device)
    report |= measure(final, tokenizer, arguments.text)
    report["samples"] = {prompt: go_on(final, tokenizer, prompt) for prompt in PROMPTS}
    (arguments.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "curve"}, indent=1))


if __name__ == "__main__":
    main()
