"""Decoding of an 8B-shaped model with an adapter on one GPU: tokens/s, and whether they are right.

    python benchmarks/decode.py --batches 1,8 --out results.json
    python benchmarks/decode.py --products    # the products alone, by tokens

The weights are random and made in place in four bits, so nothing is read from disk. Before anything
is timed, the logits of some steps are compared with those of the plain path (transformers' forward
of the whole sequence), and so are those of the same step on the reference kernels: that is how far
another order of roundings takes bf16 logits. Prints one JSON line a case.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import gpu_step
import torch
from torch import nn

import halfbyte as hb
from halfbyte.engine import decode_step
from halfbyte.engine.decode import Decoder, obstacle
from halfbyte.engine.decode_step import DecodeStep
from halfbyte.kernels.matvec_4bit import matvec_4bit
from halfbyte.kernels.matvec_4bit_parts import Group
from halfbyte.quant.weight import QuantizedWeight

# Outputs of the siblings, and inputs.
PRODUCTS = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}


def adapted_model(shape: str, rank: int, device: torch.device) -> nn.Module:
    """Return the random model with an adapter that says something, as `load_adapter` leaves it."""
    model = gpu_step.random_model(shape, device)
    model = hb.add_lora(model, hb.LoraConfig(r=rank, lora_alpha=2 * rank)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    return model.requires_grad_(requires_grad=False)


@torch.no_grad()
def check(model: nn.Module, batch: int, prompt: int, steps: int) -> dict:
    """Return how far the decoder's logits are from those of the plain path."""
    base = model.get_base_model()
    ids = random_ids(model, batch, prompt + steps)
    plain = model(input_ids=ids).logits[:, prompt - 1 :].float()
    fused = DecodeStep(base.model, base.lm_head, batch, prompt + steps)
    ours = logits_of(fused, ids, prompt)
    with mock.patch.multiple(
        decode_step,
        matvec_4bit=decode_step.matvec_4bit.__wrapped__,
        decode_attention_=decode_step.decode_attention_.__wrapped__,
    ):
        reference = logits_of(fused, ids[:, : prompt + 2], prompt)
    same = ours.argmax(-1) == plain.argmax(-1)
    return {
        "error": round(distance(ours[:, 1:], plain[:, 1:]), 5),
        "error_of_reference": round(distance(reference[:, 1:], plain[:, 1:3]), 5),
        "between_them": round(distance(ours[:, 1:3], reference[:, 1:]), 5),
        "error_of_prefill": round(distance(ours[:, :1], plain[:, :1]), 5),
        "same_likeliest_token": round(same.float().mean().item(), 4),
    }


def logits_of(step: DecodeStep, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the logits after the prompt and after each later token, `[B, 1 + steps, V]`."""
    step.refresh()
    logits = [step.prefill(ids[:, :prompt].tolist()).float()]
    for n in range(prompt, ids.shape[1]):
        step.tokens.copy_(ids[:, n])
        logits.append(step().float())
    return torch.stack(logits, 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


def random_ids(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    torch.manual_seed(2)
    size = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, size, (batch, length), device=model.device)


@torch.no_grad()
def measure(model: nn.Module, batch: int, prompt: int, new_tokens: int) -> dict:
    """Time whole answers (medians), and the recorded step alone."""
    start = time.perf_counter()
    decoder = Decoder(model, batch=batch, length=prompt + new_tokens)
    torch.cuda.synchronize()
    made = time.perf_counter() - start
    prompts = random_ids(model, batch, prompt).tolist()
    decoder.generate(prompts, max_new_tokens=8, stop=[])
    firsts, again = answers_of(decoder, prompts, 1, 5)
    wholes, answers = answers_of(decoder, prompts, new_tokens, 3)
    assert [a[:1] for a in answers] == again
    first, whole = statistics.median(firsts), statistics.median(wholes)
    step = decoder._step
    start = time.perf_counter()
    step.prefill(prompts)
    queued = time.perf_counter() - start
    step.positions.fill_(prompt)
    replay_ms = timed(decoder._advance, new_tokens)
    return {
        "tokens_per_second": round(batch * (new_tokens - 1) / (whole - first), 1),
        "with_prefill_tokens_per_second": round(batch * new_tokens / whole, 1),
        "ms_a_token": round((whole - first) * 1e3 / (new_tokens - 1), 3),
        "graph_ms_a_token": round(replay_ms, 3),
        "prefill_ms": round(first * 1e3, 1),
        "prefill_ms_each": [round(seconds * 1e3, 1) for seconds in firsts],
        "prefill_queued_in_ms": round(queued * 1e3, 1),
        "decoder_made_in_s": round(made, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def answers_of(
    decoder: Decoder, prompts: list[list[int]], new_tokens: int, count: int
) -> tuple[list[float], list[list[int]]]:
    """Return the seconds that each of `count` times took, and the last answers."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        answers = decoder.generate(prompts, max_new_tokens=new_tokens, stop=[])
        seconds.append(time.perf_counter() - start)
    return seconds, answers


def timed(run, count: int) -> float:
    """Return milliseconds of one of `count` runs in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count


def profiles(model: nn.Module, batch: int, prompt: int) -> list[str]:
    """Return the kernels of a prefill, and of one step, by their time."""
    base = model.get_base_model()
    step = DecodeStep(base.model, base.lm_head, batch, prompt + 8)
    prompts = random_ids(model, batch, prompt).tolist()
    lines = []
    for name, run in (("prefill", lambda: step.prefill(prompts)), ("step", step)):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            run()
            torch.cuda.synchronize()
        events = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in events)
        lines.append(f"{total:9.1f} us of kernels in a {name}")
        lines += [
            f"{event.self_device_time_total:9.1f} us {event.count:5d} x {event.key[:70]}"
            for event in events[:10]
        ]
    return lines


@torch.no_grad()
def time_products(device: torch.device, rank: int) -> None:
    """Time the products alone, in a graph over weights that do not fit into the cache."""
    for name, (outputs, inputs) in PRODUCTS.items():
        copies = max(2, (256 << 20) // (sum(outputs) * inputs // 2))
        groups = [group(outputs, inputs, rank, device, seed) for seed in range(copies)]
        total = sum(w.nbytes for w in groups[0].weights)
        for tokens in (1, 2, 8, 32):
            x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
            exact = matvec_4bit.__wrapped__(x, groups[0]).float()
            error = (matvec_4bit(x, groups[0]).float() - exact).norm() / exact.norm()
            ms = graphed(lambda x=x, groups=groups: [matvec_4bit(x, g) for g in groups]) / len(
                groups
            )
            result = {"product": name, "tokens": tokens, "us": round(ms * 1e3, 2)}
            result["tb_per_second"] = round(total / ms / 1e9, 3)
            result["difference_to_reference"] = round(error.item(), 6)
            print(json.dumps(result), flush=True)


def graphed(run) -> float:
    """Return the milliseconds of a run, recorded as a graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return statistics.median(timed(graph.replay, 3) for _ in range(3))


def group(outputs: tuple[int, ...], inputs: int, rank: int, device, seed: int) -> Group:
    torch.manual_seed(seed)
    kind = {"device": device, "dtype": torch.bfloat16}
    return Group(
        tuple(QuantizedWeight.quantize(torch.randn(n, inputs, **kind) * 0.02) for n in outputs),
        torch.randn(len(outputs) * rank, inputs, **kind) * 0.02,
        torch.randn(sum(outputs), rank, **kind) * 0.02,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama8b", choices=gpu_step.SHAPES)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--products", action="store_true", help="only the products, alone")
    parser.add_argument(
        "--profile", action="store_true", help="kernels of a prefill and a step by time"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    if args.products:
        time_products(device, args.rank)
        return
    model = adapted_model(args.model, args.rank, device)
    assert obstacle(model) is None
    results = []
    for batch in map(int, args.batches.split(",")):
        torch.cuda.reset_peak_memory_stats()
        result = {"batch": batch, "prompt": args.prompt, "new_tokens": args.new_tokens}
        result["check"] = check(model, batch, args.prompt, 8)
        result |= measure(model, batch, args.prompt, args.new_tokens)
        results.append(result)
        print(json.dumps(result), flush=True)
        if args.profile:
            print("\n".join(profiles(model, batch, args.prompt)), flush=True)
    if args.out:
        machine = {
            "card": torch.cuda.get_device_name(), "torch": torch.__version__, "model": args.model,
            "rank": args.rank,
        }  # fmt: skip
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
