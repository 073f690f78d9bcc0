"""Tiny models of every family that can be exported, and llama.cpp, where it is installed."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from halfbyte.gguf.vocabulary import make_vocabulary

HERE = Path(__file__).parent
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 270,  # more rows than tokens
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"attention_bias": True}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "phi3": (transformers.Phi3Config, {"sliding_window": None}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (transformers.Gemma2Config, {**GEMMA, "sliding_window": 128}),
    "gemma3_text": (transformers.Gemma3TextConfig, {**GEMMA, "sliding_window": 128}),
}


def randomize(model):
    """Give norms and biases values that a mistake would show in."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                shift = 0.0 if "norm" in name and model.config.model_type.startswith("gemma") else 1
                parameter.copy_(
                    0.2 * torch.randn_like(parameter) + (shift if "norm" in name else 0)
                )
    return model


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Return a function that writes a tiny model of a family, with the byte-level tokenizer."""

    def make(family, dtype=torch.float32, **settings) -> Path:
        folder = tmp_path_factory.mktemp(family)
        kind, own = FAMILIES[family]
        torch.manual_seed(0)
        config = kind(**{**SIZES, **own, **settings})
        model = randomize(AutoModelForCausalLM.from_config(config).to(dtype))
        model.save_pretrained(folder)
        make_byte_level().save_pretrained(folder)
        return folder

    return make


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_byte_level(pre_tokenizer=None, **settings) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a few merges and a ChatML template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("Ġ", "Ġ"), ("o", "n")]
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    for token in [*specials, *("".join(merge) for merge in merges)]:
        vocabulary[token] = len(vocabulary)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, **settings))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizer or byte_level
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


WORDS = ["▁the", "▁cat", "▁sat", "▁on", "he", "at", "▁t", "▁c", "▁s", "▁o", "▁▁", "he▁", "▁th"]


def make_sentencepiece(*, prefix: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer in the way of Llama 2's or (without a prefix) Gemma's tokenizer.json."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,?!'0123456789\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*WORDS, *letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # As transformers makes them of a SentencePiece model: every pair that forms a token.
    merges = [
        (word[:cut], word[cut:])
        for word in sorted(WORDS, key=vocabulary.__getitem__, reverse=True)
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    model = tokenizers.models.BPE(
        vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = tokenizers.Tokenizer(model)
    replace = tokenizers.normalizers.Replace(" ", "▁")
    steps = [tokenizers.normalizers.Prepend("▁"), replace] if prefix else [replace]
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<turn>", "<end>"])
    template = (
        "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}<end>"
        "{% endfor %}{% if add_generation_prompt %}<turn>assistant: {% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template.replace("assistant: {% endif", "assistant:{% endif"),
    )


@pytest.fixture(scope="session", name="make_byte_level")
def _make_byte_level():
    return make_byte_level


@pytest.fixture(scope="session", name="make_sentencepiece")
def _make_sentencepiece():
    return make_sentencepiece


@pytest.fixture
def write_tokenizer(tmp_path):
    """Return a function that writes a file that has nothing but a tokenizer."""

    def write(tokenizer, name="model", **changes):
        path = tmp_path / "tokenizer.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name(name)
        vocabulary = make_vocabulary(tokenizer, 400)
        dataclasses.replace(vocabulary, **changes).write(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def llama_cpp(tmp_path):
    """Return a function that runs a job (see llama_cpp/run.mjs) in llama.cpp itself."""
    if shutil.which("node") is None or not (HERE / "llama_cpp" / "node_modules").is_dir():
        pytest.skip(
            "llama.cpp is not there: npm install --ignore-scripts --no-package-lock "
            "--prefix tests/gguf/llama_cpp"
        )

    def run(model, **job):
        path, result = tmp_path / "job.json", tmp_path / "result.json"
        path.write_text(json.dumps({"model": str(model), **job}))
        command = ["node", HERE / "llama_cpp" / "run.mjs", path, result]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(result.read_text())

    return run
