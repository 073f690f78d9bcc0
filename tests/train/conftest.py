"""A tiny random Llama with LoRA, batches for it, and runs that are stopped and resumed."""

from pathlib import Path

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
from halfbyte.train.config import TrainConfig
from halfbyte.train.events import StepFinished, StepSkipped
from halfbyte.train.loop import train

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


class Killed(Exception):
    """The process is gone, as far as the run can tell."""


class Runs:
    """Runs of one small model, each in a folder of its own, to be stopped and resumed."""

    lengths = (5, 9, 12, 7, 20, 6, 8, 11, 4, 15, 5)
    steps = 7  # an epoch has 3

    def __init__(self, make_lora, tokenizer, rows_of, folder):
        self.make_lora, self.tokenizer = make_lora, tokenizer
        self.rows_of, self.folder = rows_of, folder

    def __call__(
        self, name, *, kill=None, model=None, data=None, lora=None, listeners=(), **settings
    ):
        """Run in this folder, killed at a step or not; return the directory."""
        if model is None:
            model = self.make_lora(num_hidden_layers=1, **(lora or {"lora_dropout": 0.2}))

        def end(event):
            if isinstance(event, StepFinished | StepSkipped) and event.step == kill:
                raise Killed  # after the update, before the checkpoint of this step

        data, eval_data = data or self.rows_of(self.lengths), settings.pop("eval_data", None)
        config = TrainConfig(
            **{
                "output_dir": str(self.folder / name),
                "max_steps": self.steps,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1e-2,
                "weight_decay": 0.1,
                "save_steps": 1,
                "disable_tqdm": True,
                **settings,
            }
        )
        try:
            train(
                model, self.tokenizer, data, config,
                eval_data=eval_data, listeners=[*listeners, end],
            )  # fmt: skip
        except Killed:
            pass
        else:
            assert kill is None
        return self.folder / name

    @staticmethod
    def adapter(out):
        """Return the bytes of the adapter that a finished run left."""
        return (Path(out) / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def run(make_lora, tokenizer, rows_of, tmp_path):
    return Runs(make_lora, tokenizer, rows_of, tmp_path)


@pytest.fixture(scope="session")
def undisturbed():
    """Adapters of whole runs, by their settings: several tests compare with the same one."""
    return {}


@pytest.fixture
def whole(run, undisturbed):
    """Return a function that returns the adapter of a run that nothing disturbed."""

    def get(**options):
        key = repr(sorted(options.items(), key=str))
        if key not in undisturbed:
            undisturbed[key] = run.adapter(run("whole", **options))
        return undisturbed[key]

    return get
