"""QLoRA with transformers, peft and trl: the usual script, with one line changed.

    python examples/sft_trainer.py --model meta-llama/Llama-3.1-8B-Instruct \
        --dataset HuggingFaceH4/ultrachat_200k --split "train_sft[:5000]" --output out

Where the usual script writes `quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...)`,
this one writes `quantization_config=NF4Config(...)`; the arguments keep their names.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from halfbyte import NF4Config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub name or folder of the base model")
    parser.add_argument(
        "--dataset", required=True, help="hub name, or a JSONL file with `messages`"
    )
    parser.add_argument("--split", default="train", help="split of the data set, slices allowed")
    parser.add_argument("--output", type=Path, default=Path("out"), help="where results go")
    parser.add_argument("--max-length", type=int, default=1024, help="longest example in tokens")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after this many steps")
    parser.add_argument("--batch-size", type=int, default=4, help="examples per micro-batch")
    return parser.parse_args()


def read(dataset: str, split: str) -> Dataset:
    if Path(dataset).is_file():
        return load_dataset("json", data_files=dataset, split=split)
    return load_dataset(dataset, split=split)


def train(args: argparse.Namespace) -> Path:
    """Load in NF4, train LoRA on all seven projections, save the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        quantization_config=NF4Config(
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        ),
        dtype=torch.bfloat16,
        device_map="auto",
    )
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(
        model,
        LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            target_modules=[
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ],
            task_type="CAUSAL_LM",
        ),
    )
    model.print_trainable_parameters()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=read(args.dataset, args.split),
        args=SFTConfig(
            output_dir=str(args.output / "checkpoints"),
            num_train_epochs=1,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=4,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            optim="paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch",
            gradient_checkpointing=True,
            max_grad_norm=0.3,
            max_length=args.max_length,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            report_to="none",
        ),
    )
    trainer.train()
    adapter = args.output / "adapter"
    trainer.save_model(str(adapter))
    tokenizer.save_pretrained(adapter)
    return adapter


def merge(model_name: str, adapter: Path, merged: Path) -> None:
    """Load the base in bf16 with plain transformers, merge the adapter, save with its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    model.save_pretrained(merged)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(merged)


def main() -> None:
    args = parse()
    adapter = train(args)
    merge(args.model, adapter, args.output / "merged")
    print(f"adapter in {adapter}, merged model in {args.output / 'merged'}")


if __name__ == "__main__":
    main()
