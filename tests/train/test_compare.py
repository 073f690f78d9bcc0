"""Two runs are the same only where every bit is, and what differs is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.errors import CheckpointError
from halfbyte.train.compare import compare_runs, differences

STEPS = [
    {"event": "step", "step": i, "loss": 1 / i, "grad_norm": 0.1, "learning_rate": 1e-4}
    | {"tokens": 9, "supervised_tokens": 5, "time": i}
    for i in range(1, 7)
]


@pytest.fixture
def runs(tmp_path):
    """Two directories of equal runs of 6 steps."""
    first = tmp_path / "first"
    (first / "checkpoint-6").mkdir(parents=True)
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(1)}, first / "adapter_model.safetensors")
    moments = {"step": torch.tensor(6), "m": torch.ones(3)}
    save_file(moments, first / "checkpoint-6" / "optimizer.safetensors")
    write_steps(first, STEPS)
    second = tmp_path / "second"
    shutil.copytree(first, second)
    return first, second


def write_steps(run, steps):
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def change(path, name, index=0):
    tensors = load_file(path)
    flat = tensors[name].view(-1).view(torch.uint8)
    flat[index] ^= 1
    save_file(tensors, path)


def test_equal_runs(runs):
    write_steps(runs[1], [step | {"time": 0, "seconds": 1.5} for step in STEPS])
    comparison = compare_runs(*runs, step=6)
    assert comparison.is_equal
    assert comparison.facts["adapter"] == "2 tensors, 7 values: equal, bit for bit"
    assert comparison.verdict(4, deterministic=False).endswith("ends with the same bits")


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("adapter_model.safetensors", "adapter"),
        ("checkpoint-6/optimizer.safetensors", "optimizer"),
    ],
)
def test_one_bit_is_found_and_its_tensor_named(runs, file, part):
    change(runs[1] / file, "a" if part == "adapter" else "m")
    comparison = compare_runs(*runs, step=6)
    assert not comparison.is_equal
    assert "1 of 2 tensors differ, most by 1.19e-07 in " in comparison.facts[part]
    assert "please report" in comparison.verdict(4, deterministic=True)
    assert "set deterministic: true" in comparison.verdict(4, deterministic=False)


@pytest.mark.parametrize(
    ("step", "says"), [(1, "not by resuming"), (5, "set deterministic: true and try again")]
)
def test_first_step_that_differs_tells_whose_fault_it_is(runs, step, says):
    other = [s | {"loss": 7.0} if s["step"] >= step else s for s in STEPS]
    write_steps(runs[1], other)
    comparison = compare_runs(*runs, step=6)
    assert comparison.first_step == step
    assert f"from step {step} on" in comparison.facts["loss, gradient"]
    assert says in comparison.verdict(4, deterministic=False)


def test_other_batches_are_worse(runs):
    write_steps(runs[1], [*STEPS[:4], STEPS[4] | {"tokens": 8}, STEPS[5]])
    assert "other batches" in compare_runs(*runs, step=6).verdict(4, deterministic=False)


def test_negative_zero_and_other_tensors_differ():
    assert differences({"a": torch.zeros(1)}, {"a": -torch.zeros(1)})
    assert "other tensors" in differences({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    assert differences({"a": torch.zeros(1)}, {"a": torch.zeros(2)})
    assert not differences({"a": torch.tensor(float("nan"))}, {"a": torch.tensor(float("nan"))})


def test_missing_file_is_named(runs):
    (runs[1] / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"second/adapter_model.safetensors is missing"):
        compare_runs(*runs, step=6)
