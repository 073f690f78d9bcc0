"""Peak memory of loading a sharded bf16 checkpoint into 4 bits, in a fresh process.

    python benchmarks/load_rss.py            # prints one JSON line

The bound is the 4-bit model, twice the largest tensor of the checkpoint, and 600 MB for Python and
its imports. The checkpoint is made in a temporary folder; `--through transformers` loads it with
`AutoModelForCausalLM.from_pretrained(..., quantization_config=NF4Config())` instead of
`halfbyte.load`,
`--through quantize` writes it to disk in 4 bits instead.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALLOWANCE_BYTES = 600_000_000


def make_checkpoint(folder: Path, num_layers: int) -> None:
    """Write a Llama of `num_layers` wide layers, 134 MB each, in shards of 300 MB."""
    import torch
    import transformers

    from halfbyte.checkpoint.writer import ShardedWriter

    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        vocab_size=32000,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with ShardedWriter(folder, max_shard_bytes=300_000_000) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, (torch.randn(tensor.shape, generator=generator) * 0.02).bfloat16())
    _make_tokenizer(folder)


def _make_tokenizer(folder: Path) -> None:
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 2}, unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def measure(folder: Path, through: str) -> dict:
    """Load the checkpoint in this process and return what it took."""
    from halfbyte.device import peak_rss_bytes

    started = time.perf_counter()
    if through == "quantize":
        from halfbyte.models.quantize import quantize

        out = quantize(folder, folder.with_name("quantized"), device="cpu")
        four_bit_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    else:
        model = _load(folder, through)
        tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
        four_bit_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "four_bit_bytes": four_bit_bytes,
    }


def _load(folder: Path, through: str):
    if through == "transformers":
        import transformers

        from halfbyte.quant.config import NF4Config

        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=NF4Config(), device_map="cpu"
        )
    import halfbyte

    return halfbyte.load(folder, device="cpu")[0]


def run(*arguments: object) -> str:
    """Run this script in a fresh process and return its last line.

    A process starts with the peak of the one that started it (Linux, getrusage(2)); so whatever
    takes memory happens in processes of their own.
    """
    command = [sys.executable, __file__, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return output.splitlines()[-1] if output else ""


def describe(folder: Path) -> dict:
    """Return how large the checkpoint is."""
    from halfbyte.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(folder)
    sizes = [reader.info(name).num_bytes for name in reader.names()]
    return {
        "checkpoint_bytes": sum(sizes),
        "shards": len(reader.files),
        "largest_tensor_bytes": max(sizes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--through", choices=["halfbyte", "transformers", "quantize"], default="halfbyte"
    )
    parser.add_argument("--make", type=Path, help="make the checkpoint in this folder, no more")
    parser.add_argument("--measure", type=Path, help="load this folder in this process, no more")
    arguments = parser.parse_args()
    if arguments.make is not None:
        make_checkpoint(arguments.make, arguments.layers)
        print(json.dumps(describe(arguments.make)))
        return
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments.through)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        result = json.loads(run("--make", folder, "--layers", arguments.layers))
        result |= json.loads(run("--measure", folder, "--through", arguments.through))
    # Writing to disk holds no model, only the tensor at hand.
    held_bytes = 0 if arguments.through == "quantize" else result["four_bit_bytes"]
    limit_bytes = held_bytes + 2 * result["largest_tensor_bytes"] + ALLOWANCE_BYTES
    result |= {
        "through": arguments.through,
        "limit_bytes": limit_bytes,
        "within": result["peak_rss_bytes"] <= limit_bytes,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
