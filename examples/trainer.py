"""QLoRA with transformers' own Trainer on plain text, with one line changed.

    python examples/trainer.py --model meta-llama/Llama-3.2-1B --dataset text.jsonl --output out

LoRA on the four attention projections; the adapter is saved, then loaded on the 4-bit base again.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from halfbyte import NF4Config


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="hub name or folder of the base model")
    parser.add_argument("--dataset", required=True, help="hub name, or a JSONL file with `text`")
    parser.add_argument("--split", default="train", help="split of the data set, slices allowed")
    parser.add_argument("--output", type=Path, default=Path("out"), help="where results go")
    parser.add_argument("--max-length", type=int, default=512, help="longest example in tokens")
    parser.add_argument("--max-steps", type=int, default=100, help="optimizer steps")
    return parser.parse_args()


def load_base(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=NF4Config(bnb_4bit_compute_dtype=torch.bfloat16),
        dtype=torch.bfloat16,
        device_map="auto",
    )


def read(args: argparse.Namespace, tokenizer: AutoTokenizer) -> Dataset:
    """Return the tokenized text, each row ended by the end-of-text token."""
    if Path(args.dataset).is_file():
        rows = load_dataset("json", data_files=args.dataset, split=args.split)
    else:
        rows = load_dataset(args.dataset, split=args.split)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text + tokenizer.eos_token for text in batch["text"]]
        return tokenizer(texts, truncation=True, max_length=args.max_length)

    return rows.map(tokenize, batched=True, remove_columns=rows.column_names)


def train(args: argparse.Namespace) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = get_peft_model(
        load_base(args.model),
        LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.05,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        train_dataset=read(args, tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        args=TrainingArguments(
            output_dir=str(args.output / "checkpoints"),
            max_steps=args.max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            learning_rate=2e-4,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            report_to="none",
        ),
    )
    trainer.train()
    adapter = args.output / "adapter"
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    return adapter


def main() -> None:
    args = parse()
    adapter = train(args)
    model = PeftModel.from_pretrained(load_base(args.model), adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    prompt = tokenizer("The", return_tensors="pt").to(model.device)
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
