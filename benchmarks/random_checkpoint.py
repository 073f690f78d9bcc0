"""Write a random bf16 checkpoint of a Llama's shape, sharded, with a byte-level tokenizer.

python benchmarks/random_checkpoint.py DIR [--shape llama8b] [--layers 32]
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from halfbyte.checkpoint.writer import ShardedWriter

TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
SHAPES = {
    "llama8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "num_hidden_layers": 32,
    },
    "llama1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "num_hidden_layers": 16,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 8192,
        "num_hidden_layers": 2,
    },
}  # fmt: skip


def tensors(config: LlamaConfig, device: str):
    """Yield names and random values, in the order of a checkpoint."""

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0, 0.02).cpu()

    hidden, wide = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * hidden // config.num_attention_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", random(config.vocab_size, hidden)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, shape in linears.items():
            yield f"{prefix}.{name}.weight", random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", torch.ones(hidden, dtype=torch.bfloat16)


def write(folder: Path, shape: str, layers: int | None = None, shard_bytes: int = 2 * 10**9) -> int:
    """Write the checkpoint and return its bytes."""
    config = LlamaConfig(**SHAPES[shape] | TOKENS)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    written = 0
    with ShardedWriter(folder, max_shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors(config, "cuda" if torch.cuda.is_available() else "cpu"):
            writer.add(name, tensor)
            written += tensor.nbytes
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama8b")
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    written = write(args.folder, args.shape, args.layers)
    print(json.dumps({"checkpoint": args.shape, "bytes": written}))


if __name__ == "__main__":
    main()
