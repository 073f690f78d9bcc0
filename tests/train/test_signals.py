"""Signals end a run after a whole step; the process's own exit is what a scheduler sees."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfbyte.train.config import TrainConfig
from halfbyte.train.events import Evaluated, StepFinished
from halfbyte.train.loop import train
from halfbyte.train.signals import Interrupted, Interruption

# A run of 8 steps; argv: output directory, resume or not, seconds to wait after each step.
RUN = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from halfbyte.train.config import TrainConfig
from halfbyte.train.events import StepFinished
from halfbyte.train.loop import train
from halfbyte.train.signals import Interrupted

out, resume, pause = sys.argv[1], sys.argv[2] == "resume", float(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2))
model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
backend = Tokenizer(BPE({"<pad>": 0}, []))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
rows = [[3 + (i * j) % 40 for j in range(4 + i % 5)] for i in range(20)]
data = Dataset.from_dict({"input_ids": rows, "labels": rows})

def wait(event):
    if isinstance(event, StepFinished):
        time.sleep(pause)

config = TrainConfig(
    output_dir=out, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=100,
    resume_from_checkpoint=resume, disable_tqdm=True,
)
try:
    train(model, tokenizer, data, config, listeners=[wait])
except Interrupted as interrupted:
    print(interrupted)
    sys.exit(interrupted.exit_code)
"""


def start(out, resume="fresh", pause=0.0):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(out), resume, str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_steps(out, steps, process):
    metrics = Path(out) / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") >= steps:
            return
        if process.poll() is not None:
            raise AssertionError(process.stderr.read())
        time.sleep(0.05)
    raise AssertionError("the run did not get there in a minute")


LENGTHS = [5, 9, 12, 7, 20, 6, 8, 11]


def signal_at(step, number):
    def listen(event):
        if isinstance(event, StepFinished) and event.step == step:
            signal.raise_signal(number)

    return listen


def config_for(out, **changes):
    return TrainConfig(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        disable_tqdm=True,
        **changes,
    )


@pytest.fixture(autouse=True)
def heeded():
    """No signal is ignored; a shell's job in the background begins with SIGINT ignored."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        is_key = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_key else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_finishes_the_step_saves_and_says_so(
    number, tmp_path, make_lora, tokenizer, rows_of
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make_lora(lora_dropout=0.1), tokenizer, rows_of(LENGTHS), config_for(whole))

    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step 3") as caught:
        train(
            make_lora(lora_dropout=0.1),
            tokenizer,
            rows_of(LENGTHS),
            config_for(cut),
            listeners=[signal_at(3, number)],
        )
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == handler
    assert [path.name for path in cut.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (cut / "adapter_model.safetensors").exists()

    resume = config_for(cut, resume_from_checkpoint="auto")
    train(make_lora(lora_dropout=0.1), tokenizer, rows_of(LENGTHS), resume)
    name = "adapter_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_signal_during_an_evaluation_ends_it(tmp_path, make_lora, tokenizer, rows_of):
    events = []

    def listen(event):
        events.append(event)
        if isinstance(event, StepFinished) and event.step == 2:
            signal.raise_signal(signal.SIGTERM)

    config = config_for(tmp_path / "out", eval_steps=2)
    with pytest.raises(Interrupted, match="after step 2"):
        train(
            make_lora(),
            tokenizer,
            rows_of(LENGTHS),
            config,
            eval_data=rows_of([9] * 50),
            listeners=[listen],
        )
    assert not any(isinstance(event, Evaluated) for event in events)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_signal_in_the_last_step_lets_the_run_finish(tmp_path, make_lora, tokenizer, rows_of):
    listeners = [signal_at(6, signal.SIGTERM)]
    config = config_for(tmp_path / "out")
    result = train(make_lora(), tokenizer, rows_of(LENGTHS), config, listeners=listeners)
    assert result.steps == 6
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_scheduler_sees_the_exit_code(tmp_path):
    out = tmp_path / "out"
    process = start(out, pause=0.3)
    wait_for_steps(out, 2, process)
    process.terminate()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM after step" in text
    (checkpoint,) = out.glob("checkpoint-*")
    saved = json.loads((checkpoint / "state.json").read_text())["progress"]["step"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == saved


@pytest.mark.slow
def test_second_signal_ends_the_process_at_once(tmp_path):
    out = tmp_path / "out"
    process = start(out, pause=30)  # the step, with its listener, takes this long
    wait_for_steps(out, 1, process)
    time.sleep(0.2)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert time.monotonic() - started < 10
    process.communicate()
    assert not list(out.glob("checkpoint-*"))


@pytest.mark.slow
def test_killed_run_holds_no_lock(tmp_path):
    out = tmp_path / "out"
    process = start(out, pause=0.3)
    wait_for_steps(out, 1, process)
    process.kill()
    process.communicate()
    again = start(out)  # nothing was saved yet, so there is nothing to lose either
    assert again.wait(120) == 0, again.stderr.read()


@pytest.mark.slow
def test_second_run_in_the_same_directory_is_refused(tmp_path):
    out = tmp_path / "out"
    first = start(out, pause=30)
    try:
        wait_for_steps(out, 1, first)
        second = start(out)
        _, errors = second.communicate(timeout=120)
        assert second.returncode != 0
        assert f"is in use by another run (process {first.pid} on" in errors
    finally:
        first.kill()
        first.communicate()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert signal.getsignal(signal.SIGTERM) != before
        assert not interruption.requested
    assert signal.getsignal(signal.SIGTERM) == before


def test_signal_that_was_ignored_stays_so():
    """nohup ignores SIGHUP, and what it starts goes on without its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_first_signal_is_remembered_and_the_second_has_its_default():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGUSR1)
        assert interruption.signum == signal.SIGUSR1
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes_are_those_of_a_shell(number, code, tmp_path):
    assert Interrupted(number, 3, tmp_path).exit_code == code
