"""Training tokens per second on a CPU: Halfbyte beside transformers + bitsandbytes + peft.

A Llama of 12 layers and width 768 (random bf16 weights, made here) in NF4 with double quantization,
rank 16 on seven projections, 8 x 128 tokens, all supervised. A step is forward, loss, backward,
clipping and AdamW. The contestants take turns step by step in one process, with the same threads
and tokens; rates are medians of elapsed time. Prints one JSON line; `ratio` is ours against the
fastest peer, and
`ratio_default` against what a user of peft's documentation runs.

    python benchmarks/cpu_step.py [--layers 12] [--steps 5] [--threads 2] [--profile FILE]
"""

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version

import peft
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import halfbyte as hb
from halfbyte.data.loader import Batch
from halfbyte.optim.adamw import AdamW
from halfbyte.train.loss import LanguageModel
from halfbyte.train.step import train_step

ROWS, LENGTH, RANK = 8, 128, 16
LEARNING_RATE, MAX_GRAD_NORM = 2e-4, 1.0
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": RANK, "lora_alpha": RANK, "target_modules": SEVEN, "task_type": "CAUSAL_LM"}

# Name: (prepare_model_for_kbit_training, gradient checkpointing, autocast: Trainer's bf16=True)
PEERS = {
    "peft_default": (True, True, True),
    "peft_prepared": (True, False, False),
    "peft_prepared_autocast": (True, False, True),
    "peft_plain": (False, False, False),
    "peft_plain_autocast": (False, False, True),
}


def make_base(folder, layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=12, max_position_embeddings=2048, dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def our_step(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=hb.NF4Config(), dtype=torch.bfloat16
    )
    model = hb.add_lora(model, hb.LoraConfig(**LORA), seed=0).train()
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    language_model = LanguageModel.of(model)

    def step(index, input_ids):
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
        supervised, tokens = ROWS * (LENGTH - 1), ROWS * LENGTH
        batch = Batch(input_ids, input_ids, positions, None, supervised, tokens)
        return train_step(
            language_model, optimizer, [batch], step=index, learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM, seed=0,
        ).loss  # fmt: skip

    return step


def peer_step(folder, *, prepared, checkpointing, autocast):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16
    )
    if prepared:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing
        )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(index, input_ids):
        context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(contestants, steps, warmup, clock):
    seconds = {name: [] for name in contestants}
    losses = {name: [] for name in contestants}
    generator = torch.Generator().manual_seed(0)
    for index in range(warmup + steps):
        input_ids = torch.randint(0, 32_000, (ROWS, LENGTH), generator=generator)
        for name, step in contestants.items():
            start = clock()
            loss = step(index, input_ids)
            if index >= warmup:
                seconds[name].append(clock() - start)
            losses[name].append(loss)
    return seconds, losses


def report(seconds, losses, options):
    rates = {name: ROWS * LENGTH / statistics.median(times) for name, times in seconds.items()}
    best_peer = max(PEERS.keys() & rates.keys(), key=rates.__getitem__)
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "benchmark": "cpu_step",
        "halfbyte_tokens_per_second": round(rates["halfbyte"], 1),
        "peer_tokens_per_second": round(rates[best_peer], 1),
        "peer": best_peer,
        "ratio": round(rates["halfbyte"] / rates[best_peer], 3),
        "ratio_default": round(rates["halfbyte"] / rates["peft_default"], 3),
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "step_seconds": {name: [round(t, 4) for t in times] for name, times in seconds.items()},
        "first_loss": {name: round(values[0], 4) for name, values in losses.items()},
        "layers": options.layers,
        "steps": options.steps,
        "threads": torch.get_num_threads(),
        "clock": "cpu" if options.cpu_time else "wall",
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: version(name) for name in packages},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds, for a machine that others use; only with --threads 1",
    )
    parser.add_argument("--only", nargs="*", help="contestants to run besides halfbyte")
    parser.add_argument(
        "--profile", help="write where Halfbyte's step spends its time to this file"
    )
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up the threads: it needs --threads 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        make_base(folder, options.layers)
        contestants = {"halfbyte": our_step(folder)}
        for name, (prepared, checkpointing, autocast) in PEERS.items():
            if options.only is None or name in options.only:
                contestants[name] = peer_step(
                    folder, prepared=prepared, checkpointing=checkpointing, autocast=autocast
                )
        if options.profile:
            write_profile(contestants["halfbyte"], options.profile)
        seconds, losses = measure(
            contestants,
            options.steps,
            options.warmup,
            time.process_time if options.cpu_time else time.perf_counter,
        )
    print(json.dumps(report(seconds, losses, options)))


def write_profile(step, path):
    input_ids = torch.randint(0, 32_000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    step(0, input_ids)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step(1, input_ids)
    table = profiler.key_averages(group_by_input_shape=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(table.table(sort_by="self_cpu_time_total", row_limit=60))


if __name__ == "__main__":
    main()
