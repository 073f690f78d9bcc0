"""A run that is stopped and resumed ends with the same bits as one that was not."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.publish import write_manifest
from halfbyte.data.config import DataConfig
from halfbyte.data.loader import BatchPlan
from halfbyte.errors import AdapterError, CheckpointError, ConfigError, TrainingError
from halfbyte.train import state as state_module
from halfbyte.train.config import TrainConfig
from halfbyte.train.events import Notice, StepFinished, StepSkipped
from halfbyte.train.loop import train
from halfbyte.train.survive import Survivor

LENGTHS = [5, 9, 12, 7, 20, 6, 8, 11, 4, 15, 5]
STEPS = 7  # an epoch has 3


class Killed(Exception):
    """The process is gone, as far as the run can tell."""


def settings(out, **changes):
    defaults = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 1,
        "disable_tqdm": True,
    }
    return TrainConfig(**{**defaults, **changes})


def kill_at(step):
    def listen(event):
        if isinstance(event, StepFinished | StepSkipped) and event.step == step:
            raise Killed  # after the update, before the checkpoint of this step

    return listen


def adapter(out):
    return (Path(out) / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def run(make_lora, tokenizer, rows_of, tmp_path):
    """Run in `tmp_path/<name>`, killed at a step or not; returns the directory."""

    def start(name, *, kill=None, data=None, lora=None, listeners=(), **changes):
        out = tmp_path / name
        model = make_lora(num_hidden_layers=1, **(lora or {"lora_dropout": 0.2}))
        listeners = [*listeners, *([kill_at(kill)] if kill else [])]
        config = settings(out, **changes)
        try:
            train(model, tokenizer, data or rows_of(LENGTHS), config, listeners=listeners)
        except Killed:
            assert kill
        return out

    return start


@pytest.fixture(scope="module")
def undisturbed():
    """Adapters of whole runs, by their settings: several tests compare with the same one."""
    return {}


@pytest.fixture
def whole(run, undisturbed):
    def get(**options):
        key = repr(sorted(options.items(), key=str))
        if key not in undisturbed:
            undisturbed[key] = adapter(run("whole", **options))
        return undisturbed[key]

    return get


@pytest.mark.parametrize("kill", [2, 3, 4, 6, STEPS])
def test_resumed_at_any_step_ends_with_the_same_bits(run, whole, kill):
    expected = whole()
    run("cut", kill=kill)
    assert adapter(run("cut", resume_from_checkpoint="auto")) == expected


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_32bit"])
def test_resume_is_exact_with_other_optimizers(run, whole, optim):
    expected = whole(optim=optim)
    run("cut", kill=4, optim=optim)
    assert adapter(run("cut", resume_from_checkpoint=True, optim=optim)) == expected


def test_resume_is_exact_with_modules_trained_in_bf16(make_llama, tokenizer, rows_of, tmp_path):
    def start(name, *listeners, **changes):
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        base = make_llama().bfloat16()
        torch.manual_seed(1)
        model = get_peft_model(base, config)
        config = settings(tmp_path / name, learning_rate=1e-4, **changes)
        train(model, tokenizer, rows_of(LENGTHS), config, listeners=listeners)
        return adapter(tmp_path / name)

    expected = start("whole")
    with pytest.raises(Killed):
        start("cut", kill_at(4))
    assert start("cut", resume_from_checkpoint="auto") == expected


@pytest.mark.parametrize("packing", [False, True])
def test_resume_is_exact_in_the_middle_of_an_epoch_of_text(run, tokenizer, tmp_path, packing):
    path = tmp_path / "rows.jsonl"
    texts = [{"text": f"{i} and " * (1 + i % 5)} for i in range(24)]
    path.write_text("\n".join(map(json.dumps, texts)))
    data = DataConfig(path=str(path), packing=packing, max_length=64)
    options = {
        "data": data,
        "lora": {"lora_dropout": 0.1, "vocab_size": len(tokenizer)},
        "save_steps": 2,
    }
    expected = adapter(run("whole", **options))
    run("cut", kill=6, **options)
    assert adapter(run("cut", resume_from_checkpoint="auto", **options)) == expected


def test_metrics_are_those_of_one_run(run, tmp_path):
    run("cut", kill=5, save_steps=2)
    run("cut", resume_from_checkpoint="auto", save_steps=2)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def test_evaluating_in_between_changes_nothing(run, whole, rows_of, make_lora, tokenizer, tmp_path):
    expected = whole()
    config = settings(tmp_path / "with", eval_steps=1)
    model = make_lora(lora_dropout=0.2, num_hidden_layers=1)
    train(model, tokenizer, rows_of(LENGTHS), config, eval_data=rows_of([9, 3], seed=5))
    assert adapter(tmp_path / "with") == expected


def test_same_seed_same_bits_other_seed_others(run):
    first, again, other = adapter(run("a")), adapter(run("b")), adapter(run("c", seed=1))
    assert first == again
    assert first != other


def test_deterministic_run_is_the_same_twice(run):
    assert adapter(run("a", deterministic=True)) == adapter(run("b", deterministic=True))


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
    assert adapter(out) == expected


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
    assert adapter(run("cut", resume_from_checkpoint="auto")) == expected
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
        run("cut", resume_from_checkpoint="auto", data=rows_of([*LENGTHS, 6]))


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


def test_named_checkpoint_elsewhere_starts_a_run_of_its_own(run, whole):
    out = run("cut", kill=5)
    branch = run("branch", resume_from_checkpoint=str(out / "checkpoint-2"))
    assert adapter(branch) == whole()


def test_checkpoint_says_what_it_holds(run):
    state = json.loads((run("cut", kill=5) / "checkpoint-4" / "state.json").read_text())
    assert state["next_batch"] == {"epoch": 1, "step": 1}
    assert {"torch", "peft", "python", "halfbyte"} <= state["versions"].keys()
    assert len(state["identity"]["data"]["order"]) == 64
    assert state["identity"]["data"]["fingerprint"]


def test_micro_steps_that_memory_made_shorter_stay_so(run, monkeypatch):
    """Cut otherwise, the sums of the resumed run would round otherwise."""
    seen = []
    step = Survivor.step

    def spy(survivor, batches, **options):
        if options["step"] == 2:
            survivor.max_tokens = 30  # as if memory had run out here
        seen.append((options["step"], survivor.max_tokens))
        return step(survivor, batches, **options)

    monkeypatch.setattr(Survivor, "step", spy)
    expected = adapter(run("whole"))
    run("cut", kill=6)
    seen.clear()
    assert adapter(run("cut", resume_from_checkpoint="auto")) == expected
    assert seen == [(5, 30), (6, 30)]


def test_damaged_generators_are_an_error(run):
    folder = run("cut", kill=3) / "checkpoint-2"
    (folder / "rng.json").write_text('{"python": 3}')
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"rng\.json cannot be read"):
        run("cut", resume_from_checkpoint=str(folder))


def test_case_81_clock_that_jumps_changes_nothing(run, whole, monkeypatch):
    expected = whole()
    clock = itertools.cycle([2e9, 0.0, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    run("cut", kill=5)
    out = run("cut", resume_from_checkpoint="auto")
    assert adapter(out) == expected
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds"] > 0 for line in lines)


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


def test_settings_that_teach_nothing_may_change(run, whole):
    expected = whole()
    run("cut", kill=4)
    changed = {"logging_steps": 3, "save_steps": 3, "save_total_limit": 1}
    assert adapter(run("cut", resume_from_checkpoint="auto", **changed)) == expected


def test_finished_run_resumes_to_itself(run):
    out = run("whole")
    before = adapter(out)
    events = []
    run("whole", resume_from_checkpoint="auto", listeners=[events.append])
    assert adapter(out) == before
    assert events == []


def test_finished_run_gives_its_adapter_to_a_model_that_resumes(
    make_lora, tokenizer, rows_of, tmp_path
):
    trained = make_lora()
    train(trained, tokenizer, rows_of(LENGTHS), settings(tmp_path / "out"))
    fresh = make_lora()
    resume = settings(tmp_path / "out", resume_from_checkpoint="auto")
    train(fresh, tokenizer, rows_of(LENGTHS), resume)
    ours = dict(fresh.named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in trained.named_parameters())


def test_nothing_to_resume_starts_from_the_beginning(run, whole):
    expected = whole()
    events = []
    out = run("fresh", resume_from_checkpoint="auto", listeners=[events.append])
    assert adapter(out) == expected
    assert any(
        isinstance(event, Notice) and "nothing to resume" in event.message for event in events
    )


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
    assert adapter(out) == expected
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
    assert adapter(run("cut", resume_from_checkpoint="auto")) == expected


def test_case_83_a_poisoned_adapter_is_never_published(make_lora, tokenizer, rows_of, tmp_path):
    """What the writing thread finds wrong ends the run."""
    model = make_lora()
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def poison(event):
        if isinstance(event, StepFinished) and event.step == 3:
            parameter.data[0, 0] = float("inf")

    with pytest.raises((AdapterError, TrainingError)):
        train(model, tokenizer, rows_of(LENGTHS), settings(tmp_path / "out"), listeners=[poison])
    assert checkpoints_in(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


def poisoned_base(make_llama):
    """A model for which every row with the token 96 is NaN."""
    base = make_llama()
    with torch.no_grad():
        base.get_input_embeddings().weight[96] = float("nan")
    return base


@pytest.mark.parametrize("kill", [None, 2, 4, 5])
def test_case_61_skipped_steps_are_counted_and_resume_to_the_same_bits(
    kill, make_llama, make_lora, tokenizer, tmp_path, undisturbed
):
    rows = [[3 + (i * j) % 40 for j in range(6 + i % 3)] for i in range(14)]
    rows[5][3] = 96
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    out = tmp_path / "out"

    def start(*listeners, **changes):
        model = make_lora(lora_dropout=0.2, base=poisoned_base(make_llama))
        config = settings(out, max_skipped_steps=2, **changes)
        train(model, tokenizer, data, config, listeners=listeners)

    skipped = []

    def listen(event):
        if isinstance(event, StepSkipped):
            skipped.append((event.step, event.skipped_steps))
            assert 5 in event.rows
            assert "row" in event.reason

    if kill:
        with pytest.raises(Killed):
            start(listen, kill_at(kill))
        start(listen, resume_from_checkpoint="auto")
    else:
        start(listen)
    assert {step for step, _ in skipped} == {2, 5}  # the row comes once in an epoch of 4 steps
    assert skipped[-1] == (5, 2)
    key = "skipped"
    assert adapter(out) == undisturbed.setdefault(key, adapter(out))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["event"]) for line in lines if line["step"] in (2, 5)] == [
        (2, "skipped_step"),
        (5, "skipped_step"),
    ]


def test_case_61_more_skipped_steps_than_allowed_end_the_run(
    make_llama, make_lora, tokenizer, tmp_path
):
    rows = [[3, 4, 5, 96 if i in (2, 9) else 6] for i in range(12)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    model = make_lora(base=poisoned_base(make_llama))
    config = settings(tmp_path / "out", max_skipped_steps=1, gradient_accumulation_steps=1)
    with pytest.raises(TrainingError, match=r"row.* (3|10)\b.* of the data; nothing was updated"):
        train(model, tokenizer, data, config)


def test_moved_run_resumes(run, whole, tmp_path):
    expected = whole()
    run("cut", kill=4)
    shutil.move(tmp_path / "cut", tmp_path / "räum lich")
    assert adapter(run("räum lich", resume_from_checkpoint="auto")) == expected
