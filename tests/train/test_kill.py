"""Killed at random moments and resumed each time, a run ends with the bits of one that was not."""

import json
import subprocess
import sys

import pytest

# argv: directory, kills, seed. Forks a run, kills it after a random time, resumes it, and so on; a
# run that comes to its end is compared, and the next one starts afresh. Prints what it counted.
HARNESS = """
import json, os, random, signal, sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from halfbyte.checkpoint.publish import verify
from halfbyte.train.config import TrainConfig
from halfbyte.train.directory import checkpoints
from halfbyte.train.loop import train

torch.set_num_threads(1)
folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
number = getattr(signal, sys.argv[4])
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
rows = [[3 + (i * j) % 40 for j in range(4 + i % 5)] for i in range(20)]
data = Dataset.from_dict({"input_ids": rows, "labels": rows})
backend = Tokenizer(BPE({"<pad>": 0}, []))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def run(out):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2))
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.1))
    config = TrainConfig(
        output_dir=str(out), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2,
        save_steps=1, save_total_limit=2, resume_from_checkpoint="auto", disable_tqdm=True,
        optim="paged_adamw_8bit",
    )
    train(model, tokenizer, data, config)


def start(out):
    child = os.fork()
    if child:
        return child
    try:
        run(out)
    except BaseException as error:
        os._exit(getattr(error, "exit_code", 1))
    os._exit(0)


def adapter(out):
    return (out / "adapter_model.safetensors").read_bytes()


began = time.monotonic()
assert os.waitpid(start(folder / "whole"), 0)[1] == 0
seconds = time.monotonic() - began
expected = adapter(folder / "whole")
dice = random.Random(seed)
counts = {"killed": 0, "finished": 0, "checkpoints_seen": 0}
while counts["killed"] < kills:
    out = folder / f"run-{counts['finished']}"
    while True:
        child = start(out)
        time.sleep(dice.uniform(0, seconds * 1.1))
        os.kill(child, number)  # a child that ended is a zombie still: this is no error
        status = os.waitpid(child, 0)[1]
        for _, path in checkpoints(out):
            verify(path)
            counts["checkpoints_seen"] += 1
        if status == 0:
            break
        code = os.waitstatus_to_exitcode(status)
        assert code in (-number, 128 + number), code
        counts["killed"] += 1
    assert adapter(out) == expected, f"{out} differs"
    counts["finished"] += 1
print(json.dumps(counts))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_killed_again_and_again_ends_with_the_same_bits(tmp_path, number):
    command = [sys.executable, "-c", HARNESS, str(tmp_path), "8", "0", number]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] >= 8
    assert counts["finished"] >= 1
