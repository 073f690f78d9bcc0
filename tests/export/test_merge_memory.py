"""A merge holds a few tensors and not the model."""

import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from halfbyte.checkpoint.reader import CheckpointReader
from halfbyte.checkpoint.writer import ShardedWriter

LIMIT_BYTES = 900_000_000
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts maps on Linux only")

# The limit holds from the first line on, for Python and all imports too.
MERGE = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
import torch
from halfbyte.export.merge import merge
from halfbyte.quant.config import NF4Config
merge(sys.argv[2], sys.argv[3], quant=NF4Config(), device="cpu", max_shard_size="200MB")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
try:
    torch.zeros(int(sys.argv[4]), dtype=torch.uint8)
except RuntimeError:
    print("as much as the checkpoint cannot be had")
"""


def make_large(folder, num_layers):
    """Write a Llama whose layers have 33 MB each, and an adapter on all of its linear layers."""
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=num_layers, vocab_size=4096,
        num_attention_heads=16, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    base, adapter = folder / "base", folder / "adapter"
    config.save_pretrained(base)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(0)
    with ShardedWriter(base, max_shard_bytes=300_000_000) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, torch.empty(tensor.shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1))
    lora = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            key = f"base_model.model.{name}"
            lora[f"{key}.lora_A.weight"] = torch.randn(8, module.in_features) * 0.02
            lora[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 8) * 0.02
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    peft.LoraConfig(base_model_name_or_path=str(base), **settings).save_pretrained(adapter)
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return base, adapter


@LINUX
@pytest.mark.slow
def test_a_checkpoint_larger_than_the_memory_limit_is_merged(tmp_path):
    base, adapter = make_large(tmp_path, num_layers=32)
    reader = CheckpointReader(base)
    checkpoint_bytes = sum(reader.info(name).num_bytes for name in reader.names())
    assert checkpoint_bytes > 1.2 * LIMIT_BYTES
    arguments = [LIMIT_BYTES, adapter, tmp_path / "out", checkpoint_bytes]
    done = subprocess.run(
        [sys.executable, "-c", MERGE, *map(str, arguments)],
        # Arrow reserves a gigabyte of addresses with the allocator that it would choose itself.
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak_bytes, refused = done.stdout.splitlines()
    assert refused == "as much as the checkpoint cannot be had"
    assert int(peak_bytes) < checkpoint_bytes
    merged = CheckpointReader(tmp_path / "out")
    assert merged.names()
    name = "model.layers.31.mlp.down_proj.weight"
    assert not torch.equal(merged.tensor(name), reader.tensor(name))
