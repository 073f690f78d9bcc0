"""Training steps of an 8B-shaped model on one GPU: tokens/s and peak memory of Halfbyte alone.

    python benchmarks/gpu_step.py --shapes 2x1024,4x2048 --memory auto,lean --out results.json

The weights are random and made in place in four bits, so nothing is read from disk; `--checkpoint`
loads what `benchmarks/random_checkpoint.py` made instead. A shape `lengths` is optimizer batches of
4 x 2 examples as long as Alpaca's. Prints one JSON line a case. The peers run in
`benchmarks/peers_step.py`, on the same shapes.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig

import halfbyte as hb
from halfbyte.data.loader import Batch
from halfbyte.device import join_memory
from halfbyte.optim.adamw import AdamW
from halfbyte.quant.linear import NF4Linear
from halfbyte.quant.weight import QuantizedWeight
from halfbyte.train.ahead import Ahead
from halfbyte.train.loss import LanguageModel
from halfbyte.train.step import train_step

SHAPES = {
    "llama8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0,
        max_position_embeddings=131072,
    ),
    "llama1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
    "tiny": dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1024,
    ),
}  # fmt: skip


def random_model(shape: str, device: torch.device) -> torch.nn.Module:
    """Return a model of the shape with random weights, its layers' linears in four bits."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = torch.randn(
                module.out_features, module.in_features, device=device, dtype=torch.bfloat16
            )
            layer = NF4Linear(module.in_features, module.out_features, bias=False)
            layer.quantized = QuantizedWeight.quantize(weight.mul_(0.02))
            model.set_submodule(name, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            module = model.get_submodule(name.rpartition(".")[0])
            value = torch.empty(parameter.shape, device=device, dtype=torch.bfloat16)
            value.fill_(1.0) if "norm" in name else value.normal_(0, 0.02)
            module.weight = torch.nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model


def batch(rows: int, length: int, vocabulary: int) -> Batch:
    ids = torch.randint(0, vocabulary, (rows, length))
    return Batch(
        input_ids=ids,
        labels=ids.clone(),
        position_ids=torch.arange(length).expand(rows, length),
        attention_mask=torch.ones_like(ids),
        num_supervised=rows * (length - 1),
        num_tokens=rows * length,
    )


def padded(lengths: list[int], vocabulary: int) -> Batch:
    """Return examples of these lengths as one padded micro-batch."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, vocabulary, mask.shape)
    return Batch(
        input_ids=ids,
        labels=torch.where(mask, ids, -100),
        position_ids=torch.arange(max(lengths)).expand(mask.shape),
        attention_mask=mask.long(),
        num_supervised=sum(lengths) - len(lengths),
        num_tokens=sum(lengths),
    )


def batches_of(case: str, lengths: list[int], vocabulary: int, step: int) -> list[Batch]:
    """Return a step's micro-batches: `RxL` is R whole rows of L, `lengths` 4 x 2 short ones."""
    if case != "lengths":
        rows, length = map(int, case.split("x"))
        return [batch(rows, length, vocabulary)]
    chosen = [lengths[(8 * step + i) % len(lengths)] for i in range(8)]
    return [padded(chosen[i : i + 2], vocabulary) for i in range(0, 8, 2)]


def measure(
    model, optimizer, memory: str, case: str, steps: int, lengths: list[int], dropout: float,
    compute: str = "bf16",
) -> dict:  # fmt: skip
    device = model.get_input_embeddings().weight.device
    # As a run with the default, paged optimizer does it.
    optimizer.place("host" if memory == "lean" else "device")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    language_model = LanguageModel.of(
        model, memory=int(memory) if memory.isdigit() else memory, compute=compute
    )
    losses, tokens = [], []
    # As the training loop does it: a step's rows are made and packed during the step before.
    count = steps + 3
    ahead = Ahead(
        lambda n: batches_of(case, lengths, model.config.vocab_size, n),
        count,
        begins=lambda _: True,
    )
    torch.cuda.synchronize(device)
    # A step ends when its loss and norm are there: so from one end to the next is one step.
    marks = [time.perf_counter()]
    for step in range(count):
        result = train_step(
            language_model, optimizer, ahead.batches(step), step=step, learning_rate=1e-4,
            max_grad_norm=1.0, seed=0, ahead=ahead,
        )  # fmt: skip
        marks.append(time.perf_counter())
        losses.append(result.loss)
        tokens.append(result.tokens)
    torch.cuda.synchronize(device)
    times = [end - begin for begin, end in itertools.pairwise(marks)]
    # Short examples come in many sizes, each of which is compiled and recorded once.
    warm = (steps + 2) // 2 if case == "lengths" else 2
    # While a step is waited for, the next is queued; behind the last there is none, so its end is
    # seen sooner than those before and it would seem shorter than it is.
    tokens, times = tokens[warm:-1], times[warm:-1]
    seconds = statistics.median(times)
    return {
        "case": case,
        "memory": memory,
        "compute": compute,
        "fused": language_model.is_fused,
        "dropout": dropout,
        "tokens_per_second": round(sum(tokens) / sum(times)),
        "step_ms": round(seconds * 1e3, 2),
        "first_step_s": round(marks[1] - marks[0], 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": round(losses[-1], 4),
    }


def profile(
    model, optimizer, memory: str, case: str, lengths: list[int], compute: str = "bf16"
) -> str:
    language_model = LanguageModel.of(model, memory=memory, compute=compute)

    def one(step: int) -> None:
        data = batches_of(case, lengths, model.config.vocab_size, step)
        train_step(
            language_model, optimizer, data, step=step, learning_rate=1e-4, max_grad_norm=1.0,
            seed=0,
        )  # fmt: skip

    one(0)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as trace:
        one(1)
        torch.cuda.synchronize()
    return trace.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=100
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama8b", choices=SHAPES)
    parser.add_argument("--shapes", default="2x1024,4x2048")
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--compute", default="bf16", help="bf16, fp8 or both")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", default="0", help="of LoRA; several with commas between")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--checkpoint", type=Path, help="load this folder; not --model")
    parser.add_argument(
        "--lengths", type=Path, default=Path(__file__).with_name("alpaca_lengths.json"),
        help="JSON list of lengths, for --shapes lengths",
    )  # fmt: skip
    parser.add_argument("--profile", type=Path, help="write kernel tables into this folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    join_memory()  # as in training
    device = torch.device("cuda")
    start = time.perf_counter()
    if args.checkpoint is None:
        model = random_model(args.model, device)
    else:
        model, _ = hb.load(args.checkpoint, device=device)
    torch.cuda.synchronize()
    loaded = round(time.perf_counter() - start, 2)
    dropouts = [float(p) for p in args.dropout.split(",")]
    model = hb.add_lora(
        model, hb.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=max(dropouts))
    )
    model.train()
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-4)
    results = []
    lengths = json.loads(args.lengths.read_text())
    variants = [args.shapes.split(","), args.memory.split(","), args.compute.split(","), dropouts]
    for shape, memory, compute, dropout in itertools.product(*variants):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        try:
            result = measure(model, optimizer, memory, shape, args.steps, lengths, dropout, compute)
        except torch.OutOfMemoryError as error:
            result = {"case": shape, "memory": memory, "error": f"out of memory: {error}"[:160]}
        result |= {"load_s": loaded} if args.checkpoint else {}
        results.append(result)
        print(json.dumps(result), flush=True)
        if args.profile and "error" not in result:
            args.profile.mkdir(parents=True, exist_ok=True)
            table = profile(model, optimizer, memory, shape, lengths, compute)
            (args.profile / f"profile_{shape}_{memory}_{compute}.txt").write_text(table)
    if args.out:
        machine = {
            "card": torch.cuda.get_device_name(), "torch": torch.__version__,
            "model": str(args.checkpoint or args.model), "rank": args.rank,
        }  # fmt: skip
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
