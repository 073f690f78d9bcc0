"""Training steps of the peers on the shapes of `gpu_step.py`: tokens/s and peak memory.

    python benchmarks/peers_step.py --impl unsloth --checkpointing default --model DIR
    python benchmarks/peers_step.py --impl transformers --liger --checkpointing off --model DIR
    python benchmarks/peers_step.py --impl trl --model DIR --shapes 2x1024
    python benchmarks/peers_step.py --impl transformers --generate 64 --model DIR

DIR is a checkpoint that `benchmarks/random_checkpoint.py` made. One process runs one peer with one
setting, rank 16 on all seven projections, bitsandbytes' PagedAdamW32bit, and prints one JSON line a
shape. `lengths` is optimizer batches of 4 x 2 examples as long as Alpaca's, padded; real tokens
count.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = Path(__file__).with_name("alpaca_lengths.json")
WARMUP = 3


def unsloth_model(args):
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        args.model, max_seq_length=8192, load_in_4bit=True, local_files_only=True
    )
    how = {"default": "unsloth", "plain": True, "off": False}[args.checkpointing]
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, target_modules=SEVEN, lora_dropout=args.dropout, bias="none",
        use_gradient_checkpointing=how, random_state=0,
    )  # fmt: skip


def quantized_model(args):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if args.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=quantization, device_map={"": args.device},
        dtype=torch.bfloat16,
    )  # fmt: skip


def lora(args):
    from peft import LoraConfig

    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=args.dropout, target_modules=SEVEN, task_type="CAUSAL_LM"
    )


def transformers_model(args):
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = quantized_model(args)
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=args.checkpointing != "off",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    return get_peft_model(model, lora(args))


def padded(lengths, vocabulary, device):
    """Return ids and mask of rows of these lengths."""
    import torch

    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, vocabulary, mask.shape)
    return ids.to(device), mask.long().to(device)


def micro_batches(shape, step, vocabulary, device):
    """Return one step's micro-batches, and its real tokens."""
    if shape == "lengths":
        lengths = json.loads(LENGTHS.read_text())
        chosen = [lengths[(8 * step + i) % len(lengths)] for i in range(8)]
        return [padded(chosen[i : i + 2], vocabulary, device) for i in range(0, 8, 2)], sum(chosen)
    rows, length = map(int, shape.split("x"))
    return [padded([length] * rows, vocabulary, device)], rows * length


def steps_of(model, args, shape):
    """Return seconds and real tokens of each step."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    if args.device == "cuda":
        import bitsandbytes

        optimizer = bitsandbytes.optim.PagedAdamW32bit(parameters, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    count = args.steps + WARMUP
    steps = [micro_batches(shape, step, 250, args.device) for step in range(count)]
    synchronize(args)
    # Nothing waits here within the run (the paged optimizer does, of itself): a step lasts from the
    # end of the one before to its own.
    marks = [mark(args)]
    for data, _ in steps:
        for ids, mask in data:
            labels = ids.masked_fill(mask == 0, -100)
            with torch.autocast(args.device, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=labels, attention_mask=mask).loss
            (loss / len(data)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        marks.append(mark(args))
    return times_between(marks, args), [tokens for _, tokens in steps]


def mark(args):
    """Return a time of the device: an event that it will pass, or on a CPU the time now."""
    import torch

    if args.device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def times_between(marks, args):
    """Return the seconds from each mark to the next, once the device has passed them all."""
    synchronize(args)
    pairs = itertools.pairwise(marks)
    if args.device != "cuda":
        return [end - begin for begin, end in pairs]
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def trl_steps(model, args, shape):
    """Return seconds and tokens of each step of trl's SFTTrainer, its defaults otherwise."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows, length = map(int, shape.split("x"))
    count = args.steps + WARMUP
    marks = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not marks:
                marks.append(mark(args))

        def on_step_end(self, *_, **__):
            marks.append(mark(args))

    ids = [[(7 * row + i) % 250 for i in range(length)] for row in range(rows * count)]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=rows, max_steps=count, max_length=length,
            optim="paged_adamw_32bit" if args.device == "cuda" else "adamw_torch",
            bf16=args.device == "cuda", use_cpu=args.device == "cpu", report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
            gradient_checkpointing=args.checkpointing != "off",
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=AutoTokenizer.from_pretrained(args.model), peft_config=lora(args),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return times_between(marks, args), [rows * length] * count


def synchronize(args):
    if args.device == "cuda":
        import torch

        torch.cuda.synchronize()


def measure(model, args, shape):
    import torch

    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model.train()
    run = trl_steps if args.impl == "trl" else steps_of
    times, tokens = run(model, args, shape)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
    return {
        "tokens_per_second": round(sum(tokens[WARMUP:]) / sum(times[WARMUP:])),
        "step_ms": round(1e3 * statistics.median(times[WARMUP:]), 1),
        "peak_gib": round(peak / 2**30, 2),
    }


def generated(model, args):
    """Return tokens a second of greedy generation, batch 1, with the adapter."""
    import torch

    model.eval()
    prompt = torch.randint(0, 250, (1, 128), device=args.device)
    greedy = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    seconds = {}
    for new_tokens in (1, args.generate):
        model.generate(prompt, max_new_tokens=new_tokens, **greedy)
        synchronize(args)
        begin = time.perf_counter()
        model.generate(prompt, max_new_tokens=new_tokens, **greedy)
        synchronize(args)
        seconds[new_tokens] = time.perf_counter() - begin
    rate = (args.generate - 1) / (seconds[args.generate] - seconds[1])
    return {"tokens_per_second": round(rate, 1), "batch": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", choices=["unsloth", "transformers", "trl"], required=True)
    parser.add_argument("--checkpointing", choices=["default", "plain", "off"], default="default")
    parser.add_argument("--liger", action="store_true", help="transformers with Liger's kernels")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", default="2x1024,4x2048")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--generate", type=int, help="only generate so many tokens, batch 1")
    args = parser.parse_args()
    start = time.perf_counter()
    models = {"unsloth": unsloth_model, "transformers": transformers_model, "trl": quantized_model}
    model = models[args.impl](args)
    loaded = time.perf_counter() - start

    import torch

    for shape in ["generate"] if args.generate else args.shapes.split(","):
        result = {
            "impl": args.impl + "+liger" * args.liger, "checkpointing": args.checkpointing,
            "dropout": args.dropout, "case": shape, "load_s": round(loaded, 1),
        }  # fmt: skip
        try:
            result |= generated(model, args) if args.generate else measure(model, args, shape)
        except torch.OutOfMemoryError as error:
            result["error"] = f"out of memory: {error}"[:160]
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
