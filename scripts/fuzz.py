"""Feed damaged files to every reader, guided by coverage: each must read them or say what is wrong.

    python scripts/fuzz.py --seconds 60                 # each kind of file
    python scripts/fuzz.py --seconds 600 adapter_config # one of them

Needs atheris (`pip install -e ".[fuzz]"`). Found is any exception that is not a HalfbyteError, an
input that takes five seconds or two GiB, or a path outside the folder. tests/fuzz feeds the same
functions with hypothesis.
"""

import argparse
import contextlib
import importlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MODULES = (
    "halfbyte.adapters.files",
    "halfbyte.checkpoint.header",
    "halfbyte.checkpoint.publish",
    "halfbyte.checkpoint.reader",
    "halfbyte.config.run",
    "halfbyte.data.files",
    "halfbyte.export.record",
    "halfbyte.quant.layout",
)
NAME = "model.layers.0.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


def safetensors_bytes(header: dict[str, Any], num_bytes: int) -> bytes:
    """Return a safetensors file with this header, and zeros behind it."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


HEADER = {
    "__metadata__": {"format": "pt"},
    NAME: {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]},
    "scalar": {"dtype": "F32", "shape": [], "data_offsets": [64, 68]},
}
LORA_HEADER = {LORA: {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}
INDEX = {
    "metadata": {"total_size": 132},
    "weight_map": {NAME: "model-1.safetensors", "scalar": "model-1.safetensors"},
}
STATE = {
    **{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 32]},
    **{"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05},
}
ADAPTER = {
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"},
    **{"target_modules": ["up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {}},
    **{"lora_dropout": 0.0, "modules_to_save": None, "init_lora_weights": True},
    **{"base_model_name_or_path": "base", "use_rslora": False, "layers_to_transform": None},
}
IDENTITY = {
    "version": 1,
    "base": {
        "name_or_path": "base",
        "fingerprint": {"kept": "00", "quantization": "nf4-64-torch.bfloat16"},
    },
    "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "packages": {"torch": "2.13.0"},
}
MANIFEST = {"version": 1, "files": {"a.json": {"bytes": 2, "sha256": "00"}}}
ROWS = b'{"prompt": "a", "completion": "b"}\n\n{"messages": [{"role": "user", "content": "x"}]}\n'
YAML = b"model: demo\npath: a.jsonl\nlora: {r: 8, target_modules: [q_proj]}\nlearning_rate: 2e-4\n"


def write_adapter(folder: Path, **files: bytes) -> None:
    """Write an adapter that can be read, but for the files that are given."""
    whole = {
        "config": ("adapter_config.json", json.dumps(ADAPTER).encode()),
        "weights": ("adapter_model.safetensors", safetensors_bytes(LORA_HEADER, 64)),
        "identity": ("halfbyte.json", json.dumps(IDENTITY).encode()),
    }
    for key, (name, content) in whole.items():
        (folder / name).write_bytes(files.get(key, content))


def read_safetensors(data: bytes, folder: Path) -> None:
    """Read every tensor of a file; together they are no larger than the file."""
    from halfbyte.checkpoint.header import read_header
    from halfbyte.checkpoint.reader import read_tensor

    path = folder / "x.safetensors"
    path.write_bytes(data)
    header = read_header(path)
    assert sum(info.num_bytes for info in header.values()) <= len(data)
    for name, info in header.items():
        assert read_tensor(name, info).nbytes == info.num_bytes


def read_index(data: bytes, folder: Path) -> None:
    """Read a folder with shards by its index; nothing outside is reached."""
    from halfbyte.checkpoint.reader import CheckpointReader

    model = folder / "model"
    if not model.exists():
        model.mkdir()
        shard = safetensors_bytes(HEADER, 68)
        for path in (model / "model-1.safetensors", folder / "outside.safetensors"):
            path.write_bytes(shard)
        (model / "link.safetensors").symlink_to(folder / "outside.safetensors")
        (model / "ring.safetensors").symlink_to(model / "ring.safetensors")
        (model / "folder.safetensors").mkdir()
    (model / "model.safetensors.index.json").write_bytes(data)
    for file in CheckpointReader(model).files:
        assert file.resolve().parent == model.resolve()


def read_quant_state(data: bytes, folder: Path) -> None:
    """Read a 4-bit weight with this state, its other tensors as long as the first bytes say."""
    import torch

    from halfbyte.kernels import codebooks
    from halfbyte.quant import layout

    wrong, blob = (data[0] % 8 if data else 0), data[1:]
    lengths = [64, 2, 16, 1, 256]
    if wrong < len(lengths):
        lengths[wrong] += 1 if wrong % 2 else -1
    packed, absmax, levels, nested, nested_map = lengths
    tensors = {
        NAME: torch.zeros(packed, 1, dtype=torch.uint8),
        f"{NAME}.absmax": torch.zeros(absmax, dtype=torch.uint8),
        f"{NAME}.quant_map": codebooks.levels("nf4").repeat(2)[:levels],
        f"{NAME}.nested_absmax": torch.ones(nested),
        f"{NAME}.nested_quant_map": torch.linspace(-1, 1, nested_map),
        NAME + layout.STATE_SUFFIXES[0]: torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        if blob
        else torch.empty(0, dtype=torch.uint8),
    }
    weight = layout.from_tensors(NAME, tensors)
    assert weight.dequantize().isfinite().all()


def read_rows(data: bytes, folder: Path) -> None:
    """Read rows; the first byte chooses the kind of file."""
    from halfbyte.data.files import READERS, read_file

    suffixes = sorted(READERS)
    path = folder / f"rows{suffixes[data[0] % len(suffixes)] if data else '.jsonl'}"
    path.write_bytes(data[1:])
    for row in read_file(path):
        assert row.where


def read_adapter_config(data: bytes, folder: Path) -> None:
    """Read an adapter with this adapter_config.json."""
    from halfbyte.adapters.files import read_adapter_files

    write_adapter(folder, config=data)
    read_adapter_files(folder)


def read_adapter_weights(data: bytes, folder: Path) -> None:
    """Read an adapter with this adapter_model.safetensors."""
    from halfbyte.adapters.files import read_adapter_files

    write_adapter(folder, weights=data)
    read_adapter_files(folder)


def read_identity(data: bytes, folder: Path) -> None:
    """Read an adapter with this halfbyte.json, and what it says about the base."""
    from halfbyte.adapters.files import read_adapter_files
    from halfbyte.export.record import recorded_recipe

    write_adapter(folder, identity=data)
    recorded_recipe(read_adapter_files(folder))


def read_run(data: bytes, folder: Path) -> None:
    """Read a run's YAML file; what was read can be written and read again."""
    from halfbyte.config.run import RunConfig

    path = folder / "run.yaml"
    path.write_bytes(data)
    run = RunConfig.from_yaml(path)
    path.write_text(run.to_yaml(), encoding="utf-8")
    assert RunConfig.from_yaml(path) == run


def read_manifest(data: bytes, folder: Path) -> None:
    """Verify a checkpoint with this manifest.json."""
    from halfbyte.checkpoint.publish import verify

    (folder / "a.json").write_text("{}")
    (folder / "manifest.json").write_bytes(data)
    verify(folder)


class Target(NamedTuple):
    """A reader, and what it reads without complaint.

    Attributes:
        read: Reads the bytes, with a folder to put them in.
        prefix: Bytes before the document, which choose a kind.
        whole: A document, or bytes, that can be read.
    """

    read: Callable[[bytes, Path], None]
    prefix: bytes
    whole: Any

    def seed(self) -> bytes:
        """Return a whole input."""
        if self.read in (read_safetensors, read_adapter_weights):
            return safetensors_bytes(self.whole, 68 if self.read is read_safetensors else 64)
        text = self.whole if isinstance(self.whole, bytes) else json.dumps(self.whole).encode()
        return self.prefix + text


TARGETS = {
    "safetensors": Target(read_safetensors, b"", HEADER),
    "index": Target(read_index, b"", INDEX),
    "quant_state": Target(read_quant_state, b"\7", STATE),
    "rows": Target(read_rows, b"\2", ROWS),
    "adapter_config": Target(read_adapter_config, b"", ADAPTER),
    "adapter_weights": Target(read_adapter_weights, b"", LORA_HEADER),
    "identity": Target(read_identity, b"", IDENTITY),
    "run": Target(read_run, b"", YAML),
    "manifest": Target(read_manifest, b"", MANIFEST),
}


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import warnings

    import atheris

    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["halfbyte"]):
        for module in MODULES:
            importlib.import_module(module)
    from halfbyte.errors import HalfbyteError

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "whole").write_bytes(TARGETS[name].seed())

    def one(data: bytes) -> None:
        with contextlib.suppress(HalfbyteError):
            TARGETS[name].read(data, folder)

    limits = [f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=2048", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix=fuzz-{name}-", str(corpus)], one)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Fuzz the chosen targets one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; by default all")
    parser.add_argument("--seconds", type=int, default=60, help="for each")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        fuzz(options.targets[0], options.seconds)
        return 0
    failed = []
    for name in options.targets or TARGETS:
        command = [sys.executable, __file__, name, f"--seconds={options.seconds}", "--here"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stderr.strip().splitlines()
        runs = next((line for line in reversed(lines) if line.startswith("Done ")), None)
        print(f"{name}: {runs or 'FAILED'}", flush=True)
        if done.returncode != 0:
            failed.append(name)
            print("\n".join(lines[-40:]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
