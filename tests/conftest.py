"""What all tests share: where Triton kernels run, and quick, quiet libraries."""

import os

# Before anything imports a library that reads these.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def half_dtype() -> torch.dtype:
    """The 16-bit dtype to test Triton kernels in: its interpreter truncates bf16 instead of
    rounding it, so float16 stands in for it where there is no GPU.
    """
    return torch.bfloat16 if torch.cuda.is_available() else torch.float16


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory):
    """Return a function that writes a tiny Llama with a byte-level tokenizer, and its folder."""

    def make(**settings) -> Path:
        folder = tmp_path_factory.mktemp("base")
        make_tokenizer().save_pretrained(folder)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **{
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "vocab_size": 260,
                "bos_token_id": None,
                "eos_token_id": 258,
                "initializer_range": 0.1,
                **settings,
            }
        )
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_base(make_base) -> Path:
    """Folder of a tiny bf16 Llama with untied embeddings and a byte-level ChatML tokenizer."""
    return make_base()


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of 256 bytes and three special tokens, with a ChatML template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
