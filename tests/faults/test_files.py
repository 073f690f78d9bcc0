"""Cases about files of models and runs that no other test has."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from halfbyte.checkpoint.header import read_json
from halfbyte.checkpoint.reader import CheckpointReader
from halfbyte.errors import AdapterError, CheckpointError, DeviceError, QuantizationError
from halfbyte.models.load import load
from halfbyte.quant.weight import QuantizedWeight
from halfbyte.train.config import TrainConfig
from halfbyte.train.loop import train


@pytest.fixture
def base(tiny_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    return folder


@pytest.mark.parametrize(
    ("size", "double_quant"), [(1e-40, True), (1e-40, False), (1e30, True), (3e38, False)]
)
def test_case_010_blocks_of_tiny_and_huge_numbers_stay_finite(size, double_quant):
    weight = torch.linspace(-1, 1, 128).mul(size).view(2, 64)
    quantized = QuantizedWeight.quantize(
        weight, quant_type="nf4", block_size=64, double_quant=double_quant
    )
    back = quantized.dequantize()
    assert torch.isfinite(back).all()
    # What is denormal may become zero.
    assert (back - weight).abs().max() <= (1.0 if size < 1e-38 else 0.3) * weight.abs().max()


def test_case_010_scales_that_have_no_mean_are_refused():
    with pytest.raises(QuantizationError, match=r"3e\+38, and the mean of its scales may overflow"):
        QuantizedWeight.quantize(torch.full((2, 64), 3e38))


def test_case_015_more_elements_than_an_int32_counts():
    weight = torch.empty(2**31 + 64, 2, dtype=torch.bfloat16, device="meta")
    packed, absmax = torch.ops.halfbyte.quantize_4bit(weight, block_size=64, quant_type="nf4")
    assert packed.shape == (2**31 + 64, 1)
    assert absmax.shape == (2**26 + 2,)


def test_case_018_an_index_with_very_many_entries_ends_soon(tmp_path):
    weight_map = {f"layer.{i}.weight": "model-1.safetensors" for i in range(200_000)}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors cannot be read"):
        CheckpointReader(tmp_path)


def test_case_022_a_number_that_becomes_infinite(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"rms_norm_eps": 1e999}')
    with pytest.raises(CheckpointError, match="1e999 is not a finite number"):
        read_json(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_case_016_a_tokenizer_that_links_to_a_file_elsewhere(base, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("a key that no model may learn")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="out of its folder"):
        load(base)


def test_case_020_a_tokenizer_that_brings_code(base, tmp_path):
    path = base / "tokenizer_config.json"
    sentinel = tmp_path / "ran"
    (base / "code.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass T: pass\n")
    settings = json.loads(path.read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["code.T", None]}, "tokenizer_class": "T"}
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="the tokenizer in"):
        load(base)
    assert not sentinel.exists()


@pytest.fixture
def interrupted(base, tmp_path):
    """A run that was stopped after its only checkpoint, and a function that resumes it."""
    rows = [[3 + (i * j) % 40 for j in range(6)] for i in range(8)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    tokenizer = AutoTokenizer.from_pretrained(base)

    def run(**changes):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        settings = {"output_dir": str(tmp_path / "out"), "disable_tqdm": True, "save_steps": 1}
        train(model, tokenizer, data, TrainConfig(**(settings | {"max_steps": 2} | changes)))
        return tmp_path / "out"

    out = run()
    (out / "run.json").unlink()
    shutil.rmtree(out / "checkpoint-2", ignore_errors=True)
    return out / "checkpoint-1", run


def test_case_085_an_optimizer_that_is_a_pickle_is_not_opened(interrupted, tmp_path):
    checkpoint, run = interrupted
    sentinel = tmp_path / "ran"
    (checkpoint / "optimizer.safetensors").unlink()
    (checkpoint / "optimizer.pt").write_bytes(f"cos\nsystem\n(S'touch {sentinel}'\ntR.".encode())
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is listed"):
        run(resume_from_checkpoint="auto")
    assert not sentinel.exists()


def test_case_084_a_checkpoint_that_is_a_link_is_read(interrupted, tmp_path):
    checkpoint, run = interrupted
    moved = tmp_path / "größer als sonst\nzwei"
    checkpoint.rename(moved)
    checkpoint.symlink_to(moved)
    assert (run(resume_from_checkpoint="auto") / "adapter_model.safetensors").exists()


def test_case_102_no_memory_for_the_model(base, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)
    with pytest.raises(DeviceError, match=r"does not fit the memory of the device.*20\.00 GiB"):
        load(base)


def test_case_101_an_adapter_that_asks_peft_for_a_module_of_its_own(base, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings |= {"megatron_config": {"x": 1}, "megatron_core": "antigravity"}
    path.write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match="megatron_config"):
        load(base, adapter=tmp_path / "adapter")
