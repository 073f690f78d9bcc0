"""A merge that is killed at any moment and started again completes with the same bytes."""

import json
import random
import subprocess
import sys

import pytest

from halfbyte.checkpoint.publish import sha256, verify

# Imports take seconds and a merge does not, so processes that are to be killed are forked.
DRIVER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from halfbyte.export.merge import merge
adapter, out, kills, seed = sys.argv[1:]
partial = os.path.join(os.path.dirname(out), "." + os.path.basename(out) + ".partial")
journal = os.path.join(partial, "journal.jsonl")

def start():
    child = os.fork()
    if child == 0:
        try:
            merge(adapter, out, max_shard_size="20KB")
        finally:
            os._exit(0)
    while not (os.path.exists(partial) or os.path.exists(out)):
        time.sleep(0.001)  # nothing is written before
    return child

def shards():
    return len(open(journal).readlines()) - 1 if os.path.exists(journal) else 0

first, began = start(), time.perf_counter()
os.waitpid(first, 0)
seconds = time.perf_counter() - began
os.rename(out, out + "-whole")
rng, kept = random.Random(int(seed)), []
while not os.path.exists(out):
    child = start()
    if len(kept) < int(kills):
        while not kept and shards() < 1 and os.path.exists(partial):
            time.sleep(0.001)  # the first one comes after a whole shard
        time.sleep(rng.uniform(0.0, seconds / (1 if kept else 4)))
        os.kill(child, signal.SIGKILL)
        kept.append(shards())
    os.waitpid(child, 0)
print(json.dumps(kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks after torch was imported")
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_completes_with_the_same_bytes(
    tiny_base, make_adapter, tmp_path, kills
):
    folder, _ = make_adapter(tiny_base)
    seed = random.randrange(1 << 30)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, folder, tmp_path / "out", str(kills), str(seed)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    kept = json.loads(done.stdout)
    assert max(kept, default=0) > 0, f"seed {seed}: no kill came after a whole shard: {kept}"
    whole, out = tmp_path / "out-whole", tmp_path / "out"
    verify(out)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert len(names) > 15
    differ = [name for name in names if sha256(whole / name) != sha256(out / name)]
    assert not differ, f"seed {seed}"
    assert not list(tmp_path.glob(".*"))
