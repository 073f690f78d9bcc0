"""Training steps of the peers on the shapes of `gpu_step.py`: tokens/s and peak memory.

    python benchmarks/peers_step.py --impl unsloth --checkpointing default --model DIR

DIR is a Llama-3-8B-shaped checkpoint, as `benchmarks/random_checkpoint.py` makes. One process runs
one peer with one setting, rank 16 on all seven projections, bitsandbytes' PagedAdamW32bit, and
prints one JSON line a shape.
"""

import argparse
import json
import statistics
import time

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def unsloth_model(path: str, checkpointing: str):
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        path, max_seq_length=8192, load_in_4bit=True, local_files_only=True
    )
    how = {"default": "unsloth", "plain": True, "off": False}[checkpointing]
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, target_modules=SEVEN, lora_dropout=0, bias="none",
        use_gradient_checkpointing=how, random_state=0,
    )  # fmt: skip


def transformers_model(path: str, checkpointing: str):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, device_map={"": 0}, dtype=torch.bfloat16
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing != "off",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", choices=["unsloth", "transformers"], required=True)
    parser.add_argument("--checkpointing", choices=["default", "plain", "off"], default="default")
    parser.add_argument("--model", required=True)
    parser.add_argument("--shapes", default="2x1024,4x2048")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    start = time.perf_counter()
    load = unsloth_model if args.impl == "unsloth" else transformers_model
    model = load(args.model, args.checkpointing)
    loaded = time.perf_counter() - start

    import bitsandbytes
    import torch

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW32bit(parameters, lr=1e-4)
    for shape in args.shapes.split(","):
        rows, length = map(int, shape.split("x"))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(args.steps + 3):
            ids = torch.randint(0, 250, (rows, length), device="cuda")
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                mask = torch.ones_like(ids)
                loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times[3:])
        result = {
            "impl": args.impl, "checkpointing": args.checkpointing, "case": shape,
            "tokens_per_second": round(rows * length / seconds),
            "step_ms": round(seconds * 1e3, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "load_s": round(loaded, 1),
        }  # fmt: skip
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
