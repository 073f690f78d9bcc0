"""A trained adapter, scored on its 4-bit base and after each way of merging it.

    halfbyte train examples/gsm8k.yaml path=gsm8k_train.jsonl max_steps=120
    python benchmarks/merge_scores.py runs/gsm8k gsm8k_test.jsonl \
        --columns '{"prompt": "question", "completion": "answer"}'
    halfbyte demo
    python benchmarks/merge_scores.py runs/demo/qlora runs/demo/task/held_out.jsonl --answers 200

Prints one JSON object a line: loss, KL divergence from the adapter on its 4-bit base (nats a
token), the share of tokens whose likeliest successor is the same, right answers where they are
asked for, and the bytes of the weights. "base" is the 4-bit base alone; "requantized" is what
quantizing the dequantized base and its update gives, which Halfbyte does not offer.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from halfbyte.adapters.files import read_adapter_files
from halfbyte.data.config import DataConfig
from halfbyte.export.measure import Reference
from halfbyte.export.merge import merge
from halfbyte.export.record import find_base, recorded_recipe
from halfbyte.generate.score import exact_match
from halfbyte.models.load import load
from halfbyte.models.quantize import quantize
from halfbyte.quant.config import NF4Config
from halfbyte.train.inputs import tokenized


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("data", type=Path, help="held-out rows")
    parser.add_argument("--columns", type=json.loads, default={}, help="as in a run file, JSON")
    parser.add_argument("--answers", type=int, default=0, help="rows to answer and compare")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    return parser.parse_args()


def candidates(run: Path, folder: Path) -> dict[str, Path]:
    """Merge in every way, and return the folders."""
    found = {form: folder / form for form in ("dequantized", "original", "quantized")}
    for form, path in found.items():
        merge(run, path, onto=form)
    merge(run, folder / "sum", onto="dequantized", dtype="float32")
    files = read_adapter_files(run)
    recipe = recorded_recipe(files)
    quantize(folder / "sum", folder / "requantized", config=recipe.config)
    return {"base": find_base(files), **found, "requantized": folder / "requantized"}


def answered(model, tokenizer, args: argparse.Namespace) -> dict[str, float]:
    if not args.answers:
        return {}
    prompt, completion = (args.columns.get(name, name) for name in ("prompt", "completion"))
    lines = args.data.read_text(encoding="utf-8").splitlines()[: args.answers]
    rows = [json.loads(line) for line in lines]
    turns = [(("user", row[prompt]), ("assistant", row[completion])) for row in rows]
    rows = [{"messages": [{"role": r, "content": c} for r, c in pair]} for pair in turns]
    extract = "number" if "####" in turns[0][1][1] else "exact"
    score = exact_match(
        model, tokenizer, rows, extract=extract, max_new_tokens=args.max_new_tokens, batch_size=100
    )
    return {"exact_match": score.exact_match, "answers": score.total}


def weights_bytes(*folders: Path) -> int:
    return sum(path.stat().st_size for each in folders for path in each.glob("*.safetensors"))


def main() -> None:
    args = arguments()
    data = DataConfig(path=str(args.data), columns=args.columns)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = candidates(args.run, folder)
        model, tokenizer = load(args.run)
        reference = Reference.of(model, tokenized(data, tokenizer, seed=0))
        line = {"model": "adapter", "loss": reference.loss, "tokens": reference.tokens}
        line |= answered(model, tokenizer, args)
        print(json.dumps(line), flush=True)
        for name, path in models.items():
            is_packed = name in ("base", "quantized", "requantized")
            model, tokenizer = load(path, quant=NF4Config() if is_packed else None)
            line = {"model": name, **dataclasses.asdict(reference.compare(model))}
            line |= answered(model, tokenizer, args) | {"bytes": weights_bytes(path)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
