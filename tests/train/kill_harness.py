"""Kills a tiny run at random moments, resumes it each time, and compares what it ends with.

    python kill_harness.py DIRECTORY KILLS SEED SIGNAL

Imports once and forks every attempt, so that hundreds of kills take minutes. After each kill every
checkpoint that can be seen must be whole; a run that comes to its end must have the bits of an
undisturbed one, and the next one starts afresh. Prints what it counted, as JSON.
"""

import collections
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte.checkpoint.publish import verify
from halfbyte.train.config import TrainConfig
from halfbyte.train.directory import METRICS_FILE, checkpoints
from halfbyte.train.loop import train

STEPS = 8
NAN_TOKEN = 49
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}


def run(out):
    """Train: dropout, 8-bit state, and a row that is not finite and so is skipped."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE, num_attention_heads=2, num_key_value_heads=2))
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN_TOKEN] = float("nan")
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    rows = [[3 + (i * j) % 40 for j in range(4 + i % 5)] for i in range(20)]
    rows[7][2] = NAN_TOKEN
    backend = Tokenizer(BPE({"<pad>": 0}, []))
    config = TrainConfig(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=1,
        save_total_limit=2,
        max_skipped_steps=2,
        resume_from_checkpoint="auto",
        disable_tqdm=True,
        optim="paged_adamw_8bit",
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    train(model, tokenizer, Dataset.from_dict({"input_ids": rows, "labels": rows}), config)


def start(out):
    """Fork an attempt, and return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        run(out)
    except BaseException as error:  # noqa: BLE001 - nothing may return into the parent's code
        code = getattr(error, "exit_code", 1)
        if code == 1:
            traceback.print_exc()
        os._exit(code)
    os._exit(0)


def wait(child, out, dice, seconds):
    """Wait a random while: from the start of the process, or from the first thing that it logs."""
    if dice.random() < 0.5:
        time.sleep(dice.uniform(0, seconds * 1.1))
        return
    before = size_of(out / METRICS_FILE)
    while size_of(out / METRICS_FILE) == before and not has_ended(child):
        time.sleep(0.002)
    time.sleep(dice.uniform(0, seconds / 2))


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def has_ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def adapter(out):
    return (out / "adapter_model.safetensors").read_bytes()


def main(folder, kills, seed, number):
    torch.set_num_threads(1)
    began = time.monotonic()
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    seconds = time.monotonic() - began
    expected = adapter(folder / "whole")
    dice = random.Random(seed)
    counts = collections.Counter()
    while counts["killed"] < kills:
        out = folder / "run"
        while True:
            child = start(out)
            wait(child, out, dice, seconds)
            os.kill(child, number)  # a child that ended is a zombie still: this is no error
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for _, path in checkpoints(out):
                verify(path)
                counts["checkpoints_seen"] += 1
            if code == 0:
                break
            assert code in (-number, 128 + number), code
            counts["killed"] += 1
            counts["saved_and_left"] += code == 128 + number
            counts["half_written"] += any(out.glob(".*.partial"))
        assert adapter(out) == expected, f"attempt {counts} ended with other bits"
        counts["finished"] += 1
        shutil.rmtree(out)
    counts["seconds"] = round(time.monotonic() - began)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), getattr(signal, sys.argv[4]))
