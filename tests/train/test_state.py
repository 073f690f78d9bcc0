"""What a checkpoint holds, what it refuses, and what damaged or refused ones leave of a run."""

import contextlib
import json
import os
import resource
import signal

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.publish import write_manifest
from halfbyte.data.loader import BatchPlan
from halfbyte.errors import AdapterError, CheckpointError, ConfigError, TrainingError
from halfbyte.train import state as state_module
from halfbyte.train.events import Notice, StepFinished, StepSkipped


def test_damaged_checkpoint_is_skipped_and_named(run, whole):
    expected = whole()
    out = run("cut", kill=5)
    newest = out / "checkpoint-4" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1  # one flipped bit: safetensors itself loads it
    newest.write_bytes(content)
    events = []
    run("cut", resume_from_checkpoint="auto", listeners=[events.append])
    messages = [event.message for event in events if isinstance(event, Notice)]
    assert any("skipped checkpoint-4" in message and "checksum" in message for message in messages)
    assert run.adapter(out) == expected


def test_damaged_checkpoint_that_was_named_is_an_error(run):
    out = run("cut", kill=5)
    (out / "checkpoint-4" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state.json is listed in the manifest but missing"):
        run("cut", resume_from_checkpoint=str(out / "checkpoint-4"))


def test_no_usable_checkpoint_is_an_error_and_not_a_new_start(run):
    out = run("cut", kill=2)
    (out / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be used: skipped checkpoint-1"
    ):
        run("cut", resume_from_checkpoint="auto")


def test_checkpoint_of_a_newer_version_names_both(run):
    out = run("cut", kill=3)
    path = out / "checkpoint-2" / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 9}))
    write_manifest(path.parent)
    with pytest.raises(CheckpointError, match="version 9, this Halfbyte reads version 2"):
        run("cut", resume_from_checkpoint=str(path.parent))


def test_strange_neighbours_are_ignored(run, whole):
    expected = whole()
    out = run("cut", kill=4)
    (out / "checkpoint-10x").mkdir()
    (out / "checkpoint-99").write_text("a file")
    (out / ".checkpoint-5.0a1b2c3d.partial").mkdir()
    assert run.adapter(run("cut", resume_from_checkpoint="auto")) == expected
    assert not (out / ".checkpoint-5.0a1b2c3d.partial").exists()


def test_latest_step_wins_whatever_the_clock_says(run):
    out = run("cut", kill=5)
    for step in range(1, 5):
        os.utime(out / f"checkpoint-{step}", (2e9 - step, 2e9 - step))
    steps = []

    def listen(event):
        if isinstance(event, StepFinished):
            steps.append(event.step)

    run("cut", resume_from_checkpoint="auto", listeners=[listen])
    assert steps[0] == 5


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"learning_rate": 2e-2}, "settings.learning_rate was 0.01, is 0.02"),
        ({"seed": 1}, "settings.seed was 42, is 1"),
        ({"max_steps": 9}, "total_steps was 7, is 9"),
        ({"lora": {"lora_dropout": 0.1}}, "adapter.lora_dropout was 0.2, is 0.1"),
        (
            {"lora": {"lora_dropout": 0.2, "initializer_range": 0.1}},
            "the base model has other weights",
        ),
    ],
)
def test_changed_run_is_refused_with_the_difference(run, changes, difference):
    run("cut", kill=3)
    with pytest.raises(ConfigError, match=difference):
        run("cut", resume_from_checkpoint="auto", **changes)


def test_changed_data_are_refused(run, rows_of):
    run("cut", kill=3)
    with pytest.raises(ConfigError, match=r"data.fingerprint was .* is .*data.rows was 11, is 12"):
        run("cut", resume_from_checkpoint="auto", data=rows_of([*run.lengths, 6]))


def test_packer_that_orders_rows_otherwise_is_refused(run, monkeypatch):
    """As another version of Halfbyte might."""
    run("cut", kill=3)
    monkeypatch.setattr(BatchPlan, "digest", lambda plan: "another order")
    with pytest.raises(ConfigError, match=r"data.order was '\w{64}', is 'another order'"):
        run("cut", resume_from_checkpoint="auto")


def test_named_checkpoint_with_newer_ones_beside_it_is_refused(run):
    out = run("cut", kill=5)
    with pytest.raises(ConfigError, match="checkpoints after step 2: checkpoint-4, checkpoint-3"):
        run("cut", resume_from_checkpoint=str(out / "checkpoint-2"))


def test_checkpoint_says_what_it_holds(run):
    state = json.loads((run("cut", kill=5) / "checkpoint-4" / "state.json").read_text())
    assert state["next_batch"] == {"epoch": 1, "step": 1}
    assert {"torch", "peft", "python", "halfbyte"} <= state["versions"].keys()
    assert len(state["identity"]["data"]["order"]) == 64
    assert state["identity"]["data"]["fingerprint"]


def test_damaged_generators_are_an_error(run):
    folder = run("cut", kill=3) / "checkpoint-2"
    (folder / "rng.json").write_text('{"python": 3}')
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"rng\.json cannot be read"):
        run("cut", resume_from_checkpoint=str(folder))


def test_change_can_be_allowed_and_is_noted(run):
    run("cut", kill=3)
    events = []
    run(
        "cut",
        resume_from_checkpoint="auto",
        resume_with_changes=True,
        learning_rate=2e-2,
        listeners=[events.append],
    )
    messages = [event.message for event in events if isinstance(event, Notice)]
    assert "resumed with a change: settings.learning_rate was 0.01, is 0.02" in messages


def test_stopped_run_is_not_silently_started_again(run):
    run("cut", kill=3)
    with pytest.raises(ConfigError, match=r"holds a run that was stopped \(checkpoint-2\)"):
        run("cut")


def test_old_checkpoints_go_and_the_newest_stay(run):
    out = run("whole", save_total_limit=2)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-6",
        "checkpoint-7",
    ]


def test_checkpoint_holds_no_pickle(run):
    out = run("whole", kill=2)
    names = {path.suffix for path in (out / "checkpoint-1").iterdir()}
    assert names == {".json", ".safetensors"}


def test_optimizer_state_of_other_shape_is_refused(run):
    out = run("cut", kill=2)
    folder = out / "checkpoint-1"
    state = load_file(folder / "optimizer.safetensors")
    name = next(name for name in state if name.startswith("exp_avg."))
    save_file({**state, name: state[name][:1].clone()}, folder / "optimizer.safetensors")
    write_manifest(folder)
    with pytest.raises(CheckpointError, match="optimizer state"):
        run("cut", resume_from_checkpoint="auto")


def checkpoints_in(out):
    return sorted(path.name for path in out.iterdir() if "checkpoint" in path.name)


def notices_in(events):
    return [event.message for event in events if isinstance(event, Notice)]


def test_case_71_disk_full_for_a_while_is_told_and_tried_again(run, whole, monkeypatch):
    saved = state_module.save_file
    calls, events = [], []

    def full(*args, **options):
        calls.append(args)
        if len(calls) in (3, 4):
            raise OSError(28, "No space left on device")
        saved(*args, **options)

    expected = whole()
    monkeypatch.setattr(state_module, "save_file", full)
    out = run("cut", listeners=[events.append])
    assert run.adapter(out) == expected
    assert checkpoints_in(out) == [f"checkpoint-{step}" for step in (1, 2, 5, 6, 7)]
    failures = [text for text in notices_in(events) if "No space left" in text]
    assert len(failures) == 2
    assert "the next save tries again" in failures[0]


def test_case_71_disk_full_when_a_signal_wants_to_save_is_an_error(run, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    def fill(event):
        if isinstance(event, StepFinished) and event.step == 3:
            monkeypatch.setattr(state_module, "save_file", full)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(CheckpointError, match="No space left on device"):
        run("cut", listeners=[fill], save_steps=2)


@pytest.mark.parametrize(("limit", "ends"), [(3_000, False), (10_000, False), (30_000, True)])
def test_case_71_files_that_may_not_grow_keep_the_checkpoint_before(run, whole, limit, ends):
    """A real refusal by the system, wherever in the files it comes; the last one takes no
    checkpoint, but still the adapter.
    """

    def refuse(event):
        if isinstance(event, StepFinished) and event.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    expected = whole()
    refused = pytest.raises(CheckpointError, match=r"failed: .*(too large|os error 27)")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = run("cut", kill=3)
    try:
        with contextlib.nullcontext() if ends else refused:
            run("cut", listeners=[refuse], resume_from_checkpoint="auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints_in(out) == ["checkpoint-1", "checkpoint-2"]
    assert run.adapter(run("cut", resume_from_checkpoint="auto")) == expected


def test_case_83_a_poisoned_adapter_is_never_published(run, make_lora, tmp_path):
    """What the writing thread finds wrong ends the run."""
    model = make_lora()
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def poison(event):
        if isinstance(event, StepFinished) and event.step == 3:
            parameter.data[0, 0] = float("inf")

    with pytest.raises((AdapterError, TrainingError)):
        run("out", model=model, listeners=[poison])
    assert checkpoints_in(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


def poisoned_base(make_llama):
    """A model for which every row with the token 96 is NaN."""
    base = make_llama()
    with torch.no_grad():
        base.get_input_embeddings().weight[96] = float("nan")
    return base


@pytest.mark.parametrize("kill", [None, 2, 4, 5])
def test_case_61_skipped_steps_are_counted_and_resume_to_the_same_bits(
    kill, run, make_llama, make_lora, undisturbed
):
    rows = [[3 + (i * j) % 40 for j in range(6 + i % 3)] for i in range(14)]
    rows[5][3] = 96
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})

    def start(**options):
        model = make_lora(lora_dropout=0.2, base=poisoned_base(make_llama))
        options |= {"model": model, "data": data, "listeners": [listen], "max_skipped_steps": 2}
        return run("out", **options)

    skipped = []

    def listen(event):
        if isinstance(event, StepSkipped):
            skipped.append((event.step, event.skipped_steps))
            assert 5 in event.rows
            assert "row" in event.reason

    out = start(kill=kill)
    if kill:
        start(resume_from_checkpoint="auto")
    assert {step for step, _ in skipped} == {2, 5}  # the row comes once in an epoch of 4 steps
    assert skipped[-1] == (5, 2)
    key = "skipped"
    assert run.adapter(out) == undisturbed.setdefault(key, run.adapter(out))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["event"]) for line in lines if line["step"] in (2, 5)] == [
        (2, "skipped_step"),
        (5, "skipped_step"),
    ]


def test_case_61_more_skipped_steps_than_allowed_end_the_run(run, make_llama, make_lora):
    rows = [[3, 4, 5, 96 if i in (2, 9) else 6] for i in range(12)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    model = make_lora(base=poisoned_base(make_llama))
    with pytest.raises(TrainingError, match=r"row.* (3|10)\b.* of the data; nothing was updated"):
        run("out", model=model, data=data, max_skipped_steps=1, gradient_accumulation_steps=1)
