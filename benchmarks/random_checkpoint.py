"""Write a random bf16 checkpoint of Llama-3-8B's shape, sharded, with a byte-level tokenizer.

python benchmarks/random_checkpoint.py DIR [--layers 32]
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from halfbyte.checkpoint.writer import ShardedWriter

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    config = LlamaConfig(**SHAPE, num_hidden_layers=args.layers)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    args.folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(args.folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

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
    writer = ShardedWriter(args.folder, max_shard_bytes=2 * 10**9)
    for name in ("model.embed_tokens", "lm_head"):
        writer.add(f"{name}.weight", random(config.vocab_size, hidden))
    writer.add("model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16))
    for layer in range(args.layers):
        prefix = f"model.layers.{layer}"
        for name, shape in linears.items():
            writer.add(f"{prefix}.{name}.weight", random(*shape))
        for name in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"{prefix}.{name}.weight", torch.ones(hidden, dtype=torch.bfloat16))
    writer.close()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
