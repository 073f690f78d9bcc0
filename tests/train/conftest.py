"""A tiny random Llama with LoRA, and batches for it."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte.data.loader import Batch
from halfbyte.engine.layer import FusedLayer
from halfbyte.train import loss as loss_module

VOCAB = 97


def llama_config(**changes):
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture
def fp8_anywhere(monkeypatch):
    """Let `compute: fp8` run where the machine cannot: through the kernels' references."""
    for name in ("require_fp8", "require_bfloat16"):
        monkeypatch.setattr(loss_module, name, lambda _: None)
    monkeypatch.setattr(loss_module, "layer_kind", lambda _: FusedLayer)


@pytest.fixture
def make_llama():
    def make(attn_implementation="sdpa", **changes):
        torch.manual_seed(0)
        config = llama_config(**changes)
        config._attn_implementation = attn_implementation
        return LlamaForCausalLM(config)

    return make


@pytest.fixture
def make_lora(make_llama):
    def make(lora_dropout=0.0, base=None, **changes):
        base = make_llama(**changes) if base is None else base
        torch.manual_seed(1)
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            lora_dropout=lora_dropout,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, config)
        with torch.no_grad():  # as if it had been trained a little: B = 0 would hide A's gradient
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        return model.train()

    return make


def padded_batch(rows, prompt=2):
    """Rows of token ids, padded on the right; the first `prompt` tokens are not supervised."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, prompt : len(row)] = torch.tensor(row[prompt:])
        mask[i, : len(row)] = 1
    positions = torch.arange(width).expand(len(rows), -1).contiguous()
    supervised = int((labels[:, 1:] != -100).sum())
    return Batch(ids, labels, positions, mask, supervised, int(mask.sum()))


def packed_batch(rows, prompt=2):
    """The same rows, one after the other in a single one."""
    ids = torch.tensor([[token for row in rows for token in row]])
    labels = torch.tensor(
        [[-100 if i < max(prompt, 1) else token for row in rows for i, token in enumerate(row)]]
    )
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    supervised = int((labels[:, 1:] != -100).sum())
    return Batch(ids, labels, positions, None, supervised, ids.numel())


def random_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def batch_of():
    def make(lengths, seed=0, packed=False, prompt=2):
        build = packed_batch if packed else padded_batch
        return build(random_rows(lengths, seed), prompt)

    return make


@pytest.fixture
def rows_of():
    """Tokenized rows; the first two tokens of each are not supervised."""

    def make(lengths, seed=0):
        rows = random_rows(lengths, seed)
        return Dataset.from_dict(
            {"input_ids": rows, "labels": [[-100, -100, *row[2:]] for row in rows]}
        )

    return make


@pytest.fixture
def tokenizer():
    """One token a byte: enough to be saved, and to write short conversations."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(BPE(vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
