"""The base model's shape, and how it is measured: bits per byte, and text it goes on with."""

import math

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_LENGTH = 1024


def build(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model: five million parameters, every linear a multiple of 64 wide."""
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    return model


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> float:
    """Return the bits that the model needs for one byte of text.

    Each text is cut into windows of MAX_LENGTH tokens, each beginning with <|bos|>, which
    is given and not predicted; its bytes are those of the UTF-8 text that the tokens decode to.
    """
    nats, num_bytes = 0.0, 0
    device = model.device
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        for start in range(0, len(ids), MAX_LENGTH - 1):
            window = ids[start : start + MAX_LENGTH - 1]
            row = torch.tensor([[tokenizer.bos_token_id, *window]], device=device)
            logits = model(input_ids=row).logits[0, :-1].float()
            nats += F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        num_bytes += len(text.encode())
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def go_on(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, *, tokens: int = 60
) -> str:
    """Return what the model writes after `text`, greedily."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return tokenizer.decode(out[0, ids.shape[1] :])
