"""A run that is stopped and resumed ends with the same bits as one that was not."""

import itertools
import json
import shutil
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from halfbyte.data.config import DataConfig
from halfbyte.train.events import Notice
from halfbyte.train.survive import Survivor


@pytest.mark.parametrize("kill", [2, 3, 4, 6, 7])
def test_resumed_at_any_step_ends_with_the_same_bits(run, whole, kill):
    expected = whole()
    run("cut", kill=kill)
    assert run.adapter(run("cut", resume_from_checkpoint="auto")) == expected


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_32bit"])
def test_resume_is_exact_with_other_optimizers(run, whole, optim):
    expected = whole(optim=optim)
    run("cut", kill=4, optim=optim)
    assert run.adapter(run("cut", resume_from_checkpoint=True, optim=optim)) == expected


def test_resume_is_exact_with_modules_trained_in_bf16(run, make_llama):
    def start(name, **options):
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        base = make_llama().bfloat16()
        torch.manual_seed(1)
        return run(name, model=get_peft_model(base, config), learning_rate=1e-4, **options)

    expected = run.adapter(start("whole"))
    start("cut", kill=4)
    assert run.adapter(start("cut", resume_from_checkpoint="auto")) == expected


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
    expected = run.adapter(run("whole", **options))
    run("cut", kill=6, **options)
    assert run.adapter(run("cut", resume_from_checkpoint="auto", **options)) == expected


def test_metrics_are_those_of_one_run(run, tmp_path):
    run("cut", kill=5, save_steps=2)
    run("cut", resume_from_checkpoint="auto", save_steps=2)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, run.steps + 1))


def test_evaluating_in_between_changes_nothing(run, whole, rows_of):
    out = run("with", eval_data=rows_of([9, 3], seed=5), eval_steps=1)
    assert run.adapter(out) == whole()


def test_same_seed_same_bits_other_seed_others(run):
    first, again, other = (
        run.adapter(run("a")),
        run.adapter(run("b")),
        run.adapter(run("c", seed=1)),
    )
    assert first == again
    assert first != other


def test_deterministic_run_is_the_same_twice(run):
    assert run.adapter(run("a", deterministic=True)) == run.adapter(run("b", deterministic=True))


def test_named_checkpoint_elsewhere_starts_a_run_of_its_own(run, whole):
    out = run("cut", kill=5)
    branch = run("branch", resume_from_checkpoint=str(out / "checkpoint-2"))
    assert run.adapter(branch) == whole()


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
    expected = run.adapter(run("whole"))
    run("cut", kill=6)
    seen.clear()
    assert run.adapter(run("cut", resume_from_checkpoint="auto")) == expected
    assert seen == [(5, 30), (6, 30)]


def test_case_81_clock_that_jumps_changes_nothing(run, whole, monkeypatch):
    expected = whole()
    clock = itertools.cycle([2e9, 0.0, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    run("cut", kill=5)
    out = run("cut", resume_from_checkpoint="auto")
    assert run.adapter(out) == expected
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds"] > 0 for line in lines)


def test_settings_that_teach_nothing_may_change(run, whole):
    expected = whole()
    run("cut", kill=4)
    changed = {"logging_steps": 3, "save_steps": 3, "save_total_limit": 1}
    assert run.adapter(run("cut", resume_from_checkpoint="auto", **changed)) == expected


def test_finished_run_resumes_to_itself(run):
    out = run("whole")
    before = run.adapter(out)
    events = []
    run("whole", resume_from_checkpoint="auto", listeners=[events.append])
    assert run.adapter(out) == before
    assert events == []


def test_finished_run_gives_its_adapter_to_a_model_that_resumes(run, make_lora):
    trained, fresh = make_lora(), make_lora()
    run("out", model=trained)
    run("out", model=fresh, resume_from_checkpoint="auto")
    ours = dict(fresh.named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in trained.named_parameters())


def test_nothing_to_resume_starts_from_the_beginning(run, whole):
    expected = whole()
    events = []
    out = run("fresh", resume_from_checkpoint="auto", listeners=[events.append])
    assert run.adapter(out) == expected
    assert any(
        isinstance(event, Notice) and "nothing to resume" in event.message for event in events
    )


def test_moved_run_resumes(run, whole, tmp_path):
    expected = whole()
    run("cut", kill=4)
    shutil.move(tmp_path / "cut", tmp_path / "räum lich")
    assert run.adapter(run("räum lich", resume_from_checkpoint="auto")) == expected
