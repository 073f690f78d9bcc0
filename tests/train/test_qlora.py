"""The real thing, small: a 4-bit base in bf16, our adapters, text rows, and back from disk."""

import pytest
import torch

import halfbyte as hb
from halfbyte.data.prepare import prepare
from halfbyte.train.events import StepFinished

ROWS = [
    {"prompt": f"say {word}", "completion": word.upper()}
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
]


@pytest.fixture
def settings(tmp_path):
    def make(name, **changes):
        defaults = {
            "output_dir": str(tmp_path / name),
            "num_train_epochs": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2e-2,
            "save_steps": 2,
            "disable_tqdm": True,
        }
        return hb.TrainConfig(**{**defaults, **changes})

    return make


@pytest.fixture
def load_with_lora(tiny_base):
    def load(dropout=0.0):
        model, tokenizer = hb.load(tiny_base, quant=hb.NF4Config(), dtype=torch.bfloat16)
        config = hb.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout)
        return hb.add_lora(model, config, seed=0), tokenizer

    return load


@pytest.mark.parametrize("packing", [False, True])
def test_adapter_learns_and_comes_back_from_disk(packing, load_with_lora, tiny_base, settings):
    model, tokenizer = load_with_lora()
    before = hb.evaluate(model, tokenizer, ROWS).loss
    data = hb.DataConfig(packing=packing, max_length=64)
    rows = prepare(data, tokenizer, seed=0, rows=ROWS).train
    result = hb.train(
        model, tokenizer, rows, settings("out", num_train_epochs=5, logging_steps=5, save_steps=10)
    )
    after = hb.evaluate(model, tokenizer, ROWS).loss
    assert after < before - 1

    base, tokenizer = hb.load(tiny_base, quant=hb.NF4Config(), dtype=torch.bfloat16)
    reloaded = hb.load_adapter(base, result.output_dir)
    assert hb.evaluate(reloaded, tokenizer, ROWS).loss == pytest.approx(after, abs=1e-6)


def test_4bit_run_resumes_bit_for_bit(load_with_lora, settings):
    class Killed(Exception):
        pass

    def kill(event):
        if isinstance(event, StepFinished) and event.step == 5:
            raise Killed

    name = "adapter_model.safetensors"
    whole = hb.train(*load_with_lora(dropout=0.1), ROWS, settings("whole")).output_dir
    with pytest.raises(Killed):
        hb.train(*load_with_lora(dropout=0.1), ROWS, settings("cut"), listeners=[kill])
    resume = settings("cut", resume_from_checkpoint="auto")
    cut = hb.train(*load_with_lora(dropout=0.1), ROWS, resume).output_dir
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_public_functions_are_not_hidden_by_the_parts_of_their_names():
    import halfbyte.generate.generate
    import halfbyte.train.loop

    assert callable(halfbyte.train)
    assert callable(halfbyte.generate)
