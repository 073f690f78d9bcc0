"""A run tells its memory, and that it ran out, and goes on."""

import json
import shutil

import pytest
import torch

from halfbyte.data.loader import BatchPlan
from halfbyte.errors import DeviceError
from halfbyte.memory.pages import Paging
from halfbyte.memory.shortage import Shortage
from halfbyte.optim import adamw
from halfbyte.optim.adamw import AdamW
from halfbyte.train import loss as loss_module
from halfbyte.train.config import TrainConfig
from halfbyte.train.events import MemoryShort, StepFinished
from halfbyte.train.loop import train
from halfbyte.train.loss import LanguageModel
from halfbyte.train.memory import (
    explain,
    longest_step,
    memory_fields,
    peak_by_owner,
    rehearse,
)
from halfbyte.train.survive import Survivor


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4,
        disable_tqdm=True,
    )  # fmt: skip


def test_a_run_that_runs_out_of_memory_says_so_and_finishes(
    make_lora, rows_of, tokenizer, config, monkeypatch
):
    real, calls = loss_module.linear_cross_entropy, []

    def sometimes(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 3):
            raise torch.OutOfMemoryError("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(loss_module, "linear_cross_entropy", sometimes)
    events = []
    result = train(
        make_lora(), tokenizer, rows_of([9, 5, 7, 12] * 3), config, listeners=[events.append]
    )
    assert result.steps == 3
    (short,) = [event for event in events if isinstance(event, MemoryShort)]
    assert short.step == 2
    assert short.measures[0] == "computes every layer twice"
    assert short.max_tokens is not None
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").open()]
    (record,) = [line for line in lines if line["event"] == "memory"]
    assert record["measures"] == list(short.measures)
    steps = [event for event in events if isinstance(event, StepFinished)]
    assert all(event.host_bytes > 2**20 and event.allocated_bytes for event in steps)


def test_a_run_that_cannot_fit_ends_with_an_explanation(
    make_lora, rows_of, tokenizer, config, monkeypatch
):
    def never(*args, **kwargs):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(loss_module, "linear_cross_entropy", never)
    with pytest.raises(DeviceError, match="cut as small as it can be: injected") as caught:
        train(make_lora(), tokenizer, rows_of([9, 5, 7, 12] * 3), config)
    assert "max_length" in caught.value.hint


def test_fields_on_a_cpu(make_lora):
    model = make_lora()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    fields = memory_fields(model, optimizer)
    assert fields["memory_bytes"] >= fields["allocated_bytes"] > 0
    assert fields["paged_bytes"] == 0
    assert peak_by_owner(model, optimizer) == {}


def test_explanation_knows_the_longest_row(make_lora, rows_of):
    rows = rows_of([9, 30, 7])
    batches = BatchPlan(
        rows, batch_size=2, gradient_accumulation_steps=1, packing=False, max_length=64, seed=0,
        pad_token_id=0,
    )  # fmt: skip
    shortage = Shortage(torch.device("cuda"), "no room", total_bytes=2**30)
    error = explain(shortage, make_lora(), TrainConfig(per_device_train_batch_size=2), batches)
    assert "1 x 30 tokens" in error.message


def plan_of(rows, **changes):
    settings = {
        "batch_size": 2, "gradient_accumulation_steps": 2, "packing": False, "max_length": 64,
        "seed": 0, "pad_token_id": 0,
    }  # fmt: skip
    return BatchPlan(rows, **{**settings, **changes})


def test_the_longest_step_has_the_longest_rows(rows_of):
    batches = longest_step(plan_of(rows_of([9, 30, 7, 12, 5, 20])))
    assert [batch.num_tokens for batch in batches] == [50, 21]
    packed = longest_step(plan_of(rows_of([9, 30, 7, 12, 5, 20]), packing=True))
    assert sum(batch.num_tokens for batch in packed) > 60


def test_a_rehearsal_changes_nothing_and_tells_both_numbers(make_lora, rows_of):
    model = make_lora()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    steps = Survivor(LanguageModel.of(model), optimizer, tell=print, explain=print)
    notice = rehearse(steps, plan_of(rows_of([9, 30, 7, 12])), TrainConfig())
    assert "predicted" in notice.message
    assert "measured" in notice.message
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.grad_norm() == 0
    assert optimizer.steps_done == 0


LIMITS = {"device": None, "both": 2**14, "host": 0}


@pytest.mark.parametrize(
    ("optim", "first", "second"),
    [
        ("paged_adamw_32bit", "host", "device"),
        ("paged_adamw_32bit", "device", "both"),
        ("paged_adamw_8bit", "both", "host"),
    ],
)
def test_pages_on_the_host_are_told_saved_and_resumed_as_if_they_were_on_the_device(
    optim, first, second, make_lora, rows_of, tokenizer, tmp_path, fake_pool, monkeypatch
):
    rows = rows_of([9, 5, 7, 12])
    monkeypatch.setattr(adamw, "pool_for", lambda _: fake_pool(10**8))

    def run(place, resume=None):
        paging = Paging(2**12, resident_bytes=LIMITS[place])
        monkeypatch.setattr(adamw, "Paging", lambda: paging)
        folder = tmp_path / f"{place}-{resume}"
        if resume:
            shutil.copytree(tmp_path / f"{resume}-None" / "checkpoint-1", folder / "checkpoint-1")
        settings = TrainConfig(
            output_dir=str(folder), max_steps=2, save_steps=1, optim=optim, disable_tqdm=True,
            per_device_train_batch_size=4, resume_from_checkpoint="auto" if resume else None,
        )  # fmt: skip
        result = train(make_lora(), tokenizer, rows, settings)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        told = [record["paged_bytes"] for record in records if record["event"] == "step"]
        assert told == [result.paged_bytes] * len(told) != []
        assert result.host_bytes >= 2**20
        files = "adapter_model.safetensors", "checkpoint-2/optimizer.safetensors"
        return result.paged_bytes, *((folder / name).read_bytes() for name in files)

    results = [run(first), run(second), run(second, resume=first)]
    for place, (paged_bytes, *_) in zip((first, second, second), results, strict=True):
        assert (paged_bytes > 0) == (place != "device")
    files = [files for _, *files in results]
    assert files[0] == files[1] == files[2]
