"""Models of real shapes with random 4-bit weights, made in place on the GPU: nothing is read."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig

import halfbyte as hb
from halfbyte.data.loader import Batch
from halfbyte.kernels import codebooks
from halfbyte.quant.linear import NF4Linear
from halfbyte.quant.weight import QuantizedWeight

_LLAMA3 = dict(vocab_size=128256, rope_theta=500000.0, max_position_embeddings=131072)
CONFIGS = {
    "llama1b": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, **_LLAMA3,
    ),
    "llama8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, **_LLAMA3,
    ),
    "llama70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, **_LLAMA3,
    ),
    "llama33b": LlamaConfig(
        hidden_size=6656, intermediate_size=17920, num_hidden_layers=60, num_attention_heads=52,
        num_key_value_heads=52, vocab_size=32000, max_position_embeddings=131072,
    ),
    "llama65b": LlamaConfig(
        hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=64, vocab_size=32000, max_position_embeddings=131072,
    ),
    "mistral7b": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32768, sliding_window=None,
        max_position_embeddings=131072,
    ),
    "gemma2b": GemmaConfig(
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, vocab_size=256000, max_position_embeddings=131072,
    ),
    "tiny": LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1024, max_position_embeddings=131072,
    ),
}  # fmt: skip


def random_weight(rows: int, columns: int, device: torch.device) -> QuantizedWeight:
    """Return random codes with random scales near those of a trained layer."""
    numel = rows * columns
    blocks = -(-numel // 64)
    groups = -(-blocks // 256)
    return QuantizedWeight(
        packed=torch.randint(256, ((numel + 1) // 2, 1), dtype=torch.uint8, device=device),
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        nested_absmax=torch.full((groups,), 0.02, device=device),
        nested_map=codebooks.dynamic_map().to(device),
        offset=torch.tensor(0.05, device=device),
        shape=torch.Size((rows, columns)),
        dtype=torch.bfloat16,
    )


def random_model(name: str, device: torch.device, *, rank: int, dropout: float = 0.0):
    """Return an adapted model of a shape, in training mode."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            layer = NF4Linear(module.in_features, module.out_features, bias=False)
            layer.quantized = random_weight(module.out_features, module.in_features, device)
            model.set_submodule(path, layer)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.empty(parameter.shape, device=device, dtype=torch.bfloat16)
            value.fill_(1.0) if "norm" in path else value.normal_(0, 0.02)
            holder = model.get_submodule(path.rpartition(".")[0])
            holder.weight = nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for path, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # Gemma's scale of embeddings
            holder, _, name = path.rpartition(".")
            setattr(model.get_submodule(holder), name, torch.tensor(config.hidden_size**0.5))
    lora = hb.LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout)
    with device:
        model = hb.add_lora(model, lora)
    return model.to(device).train()


def batch(rows: int, length: int, vocabulary: int) -> Batch:
    """Return rows of random tokens, all supervised."""
    ids = torch.randint(0, vocabulary, (rows, length))
    return Batch(
        input_ids=ids,
        labels=ids.clone(),
        position_ids=torch.arange(length).expand(rows, length).contiguous(),
        attention_mask=None,
        num_supervised=rows * (length - 1),
        num_tokens=rows * length,
    )


def release() -> None:
    """Give everything back that nobody holds, cuBLAS's workspaces too."""
    import gc

    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
