"""Small tokenizers, trained on the spot."""

import functools

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The cat sat on the mat and looked at the rain.",
    "What is two plus two? Two plus two is four, of course.",
    "Below is an instruction that describes a task. user assistant system model",
    "Paris is the capital of France; 12345 + 67890 = 80235.",
]


@functools.cache
def byte_level(special=(), bos="<s>", eos="</s>", template=None, adds_bos=False):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokens = [token for token in (bos, eos) if token] + list(special)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(dict.fromkeys(tokens)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 4, trainer)
    if adds_bos:
        first = (bos, core.token_to_id(bos))
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[first]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, chat_template=template
    )


@functools.cache
def sentencepiece_like(template=None):
    """Spaces as U+2581, and one put before each text, as in Llama 2."""
    core = Tokenizer(models.BPE(fuse_unk=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    core.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


@pytest.fixture
def make_tokenizer():
    """Return a maker of byte-level tokenizers."""
    return byte_level


@pytest.fixture
def make_sentencepiece():
    return sentencepiece_like


@pytest.fixture
def tokenizer():
    """Return a base model's tokenizer: BOS and EOS, no chat template."""
    return byte_level()


@pytest.fixture
def learned():
    """Return a function: what a row teaches, as one string per run of learned tokens."""

    def read(tokenizer, row):
        runs, run = [], []
        for label in [*row.labels, -100]:
            if label != -100:
                run.append(label)
            elif run:
                runs.append(tokenizer.decode(run, skip_special_tokens=False))
                run = []
        return runs

    return read
