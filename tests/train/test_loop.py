"""A run from end to end: what it leaves, what it says, what it refuses."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from halfbyte.data.config import DataConfig
from halfbyte.data.loader import BatchPlan
from halfbyte.errors import CheckpointError, ConfigError, DataError, TrainingError
from halfbyte.train import loop
from halfbyte.train import metrics as metrics_module
from halfbyte.train.config import TrainConfig
from halfbyte.train.directory import locked
from halfbyte.train.events import (
    CheckpointSaved,
    Evaluated,
    Notice,
    StepFinished,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
)
from halfbyte.train.loop import train

LENGTHS = [5, 9, 12, 7, 20, 6, 8, 11, 4, 15]


@pytest.fixture
def settings(tmp_path):
    def make(**changes):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "disable_tqdm": True,
        }
        return TrainConfig(**{**defaults, **changes})

    return make


def kinds(events):
    return [type(event) for event in events]


def test_leaves_an_adapter_that_plain_peft_loads(
    make_lora, make_llama, tokenizer, rows_of, settings, tmp_path, batch_of
):
    model = make_lora()
    result = train(model, tokenizer, rows_of(LENGTHS), settings())
    out = tmp_path / "out"
    assert (result.steps, result.output_dir) == (6, out)
    assert result.tokens_per_second > 0
    reloaded = PeftModel.from_pretrained(make_llama(), out).eval()
    ids = batch_of([9]).input_ids
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(out).decode([3, 4]) == tokenizer.decode([3, 4])
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["result"]["loss"] == result.loss
    assert run["settings"]["learning_rate"] == 1e-2
    assert not [path.name for path in out.iterdir() if path.name.endswith((".partial", ".tmp"))]


def test_loss_falls_and_the_base_stays(make_lora, tokenizer, rows_of, settings):
    model = make_lora(initializer_range=0.2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []

    def listen(event):
        if isinstance(event, StepFinished):
            losses.append(event.loss)

    config = settings(max_steps=30, learning_rate=2e-2)
    train(model, tokenizer, rows_of(LENGTHS), config, listeners=[listen])
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_tells_its_listeners_in_order(make_lora, tokenizer, rows_of, settings):
    events = []
    config = settings(max_steps=4, eval_steps=2, save_steps=2, eval_on_start=True)
    train(
        make_lora(),
        tokenizer,
        rows_of(LENGTHS),
        config,
        eval_data=rows_of([9]),
        listeners=[events.append],
    )
    saved = [event for event in events if isinstance(event, CheckpointSaved)]
    assert [event.step for event in saved] == [2, 4]
    rest = [event for event in events if event not in saved]  # writing has its own pace
    assert kinds(rest) == [
        TrainingStarted,
        Evaluated,
        *(StepFinished, StepFinished, Evaluated),
        *(StepFinished, StepFinished, Evaluated),
        TrainingFinished,
    ]
    assert events[0].train_rows == 10
    assert events[0].trainable_parameters == 8192
    assert events[-1].result.eval_loss == rest[-2].loss


def test_steps_that_are_queued_early_change_no_bit(
    make_lora, tokenizer, rows_of, settings, monkeypatch
):
    """As on a GPU: but not where an evaluation or a checkpoint comes before them."""
    config = {"eval_steps": 3, "save_steps": 4, "overwrite_output_dir": True}

    def run():
        model = make_lora(lora_dropout=0.2)
        data = {"eval_data": rows_of([9])}
        result = train(model, tokenizer, rows_of(LENGTHS), settings(**config), **data)
        return {n: p for n, p in model.named_parameters() if "lora" in n}, result

    plain, expected = run()
    may_begin, begun = loop._may_begin, []

    def on_a_gpu(run, step):
        assert not may_begin(run, step)
        stand_in = SimpleNamespace(
            device=torch.device("cuda"), evaluates=run.evaluates, saves=run.saves
        )
        begun.extend([step] if may_begin(stand_in, step) else [])
        return step in begun

    monkeypatch.setattr(loop, "_may_begin", on_a_gpu)
    found, result = run()
    assert begun == [1, 2, 5]
    assert (result.loss, result.eval_loss) == (expected.loss, expected.eval_loss)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_epochs_become_steps_and_every_row_is_seen(make_lora, tokenizer, rows_of, settings):
    events = []
    config = settings(max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=1)
    train(make_lora(), tokenizer, rows_of(LENGTHS), config, listeners=[events.append])
    steps = [event for event in events if isinstance(event, StepFinished)]
    assert len(steps) == 8  # 1.5 times 10 / 2 steps, rounded up
    assert sum(step.tokens for step in steps[:5]) == sum(LENGTHS)
    assert steps[4].epoch == 1.0


def test_metrics_hold_every_logged_step(make_lora, tokenizer, rows_of, settings, tmp_path):
    events = []
    config = settings(logging_steps=2, eval_steps=3)
    train(
        make_lora(),
        tokenizer,
        rows_of(LENGTHS),
        config,
        eval_data=rows_of([9]),
        listeners=[events.append],
    )
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(line["event"], line["step"]) for line in lines] == [
        ("step", 2),
        ("evaluation", 3),
        ("step", 4),
        ("step", 6),
        ("evaluation", 6),
    ]
    steps = [event for event in events if isinstance(event, StepFinished)]
    total = sum(step.loss * step.supervised_tokens for step in steps[:2])
    assert lines[0]["loss"] == pytest.approx(total / lines[0]["supervised_tokens"])
    assert lines[0]["tokens"] == steps[0].tokens + steps[1].tokens


def test_conversations_in_a_file_train_with_the_template_saved(
    make_lora, tokenizer, settings, tmp_path
):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(8)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(path=str(path), chat_template="zephyr", eval_fraction=0.25)
    model = make_lora(vocab_size=len(tokenizer))
    result = train(model, tokenizer, data, settings())
    assert result.eval_loss is not None
    assert tokenizer.chat_template is None
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<|assistant|>" in saved.apply_chat_template(rows[0]["messages"], tokenize=False)
    summary = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["summary"]
    assert summary["train"]["rows"] == 6


def test_rows_in_memory_train(make_lora, tokenizer, settings):
    rows = [{"text": f"the number {i} follows {i - 1}"} for i in range(8)]
    result = train(make_lora(vocab_size=len(tokenizer)), tokenizer, rows, settings(max_steps=2))
    assert result.steps == 2


def test_activation_checkpointing_gives_the_same_adapter(
    make_lora, tokenizer, rows_of, settings, tmp_path
):
    outputs = []
    for checkpointing in (False, True):
        out = tmp_path / f"out-{checkpointing}"
        config = settings(output_dir=str(out), gradient_checkpointing=checkpointing)
        train(make_lora(lora_dropout=0.1), tokenizer, rows_of(LENGTHS), config)
        outputs.append((out / "adapter_model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def test_trains_twice_the_same_model(make_llama, make_lora, tokenizer, rows_of, settings):
    """bf16 modules trained in full have hooks, which must be gone after a run."""
    base = make_llama().bfloat16()
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(base, config)
    train(model, tokenizer, rows_of(LENGTHS), settings(max_steps=2))
    again = settings(max_steps=2, overwrite_output_dir=True)
    assert train(model, tokenizer, rows_of(LENGTHS), again).steps == 2


def test_plain_model_says_to_add_adapters(make_llama, tokenizer, rows_of, settings, tmp_path):
    with pytest.raises(ConfigError, match=r"hint: model = halfbyte.add_lora"):
        train(make_llama(), tokenizer, rows_of(LENGTHS), settings())
    assert not (tmp_path / "out").exists()


def test_no_rows_is_an_error(make_lora, tokenizer, rows_of, settings):
    with pytest.raises(DataError, match="no rows"):
        train(make_lora(), tokenizer, rows_of([]), settings())


def test_missing_file_is_an_error_and_leaves_nothing(make_lora, tokenizer, settings, tmp_path):
    with pytest.raises(DataError, match=r"missing.jsonl"):
        train(make_lora(), tokenizer, "missing.jsonl", settings())
    assert not (tmp_path / "out").exists()


def test_directory_in_use_is_refused_before_the_data_are_read(
    make_lora, tokenizer, settings, tmp_path
):
    with locked(tmp_path / "out"), pytest.raises(ConfigError, match="in use by another run"):
        train(make_lora(), tokenizer, "missing.jsonl", settings())


def test_metrics_that_the_disk_does_not_take_end_no_run(
    make_lora, tokenizer, rows_of, settings, tmp_path, monkeypatch
):
    def refuse(path, content):
        if b'"step": 3' in content:
            raise OSError(28, "No space left on device")
        append(path, content)

    append = metrics_module._append
    monkeypatch.setattr(metrics_module, "_append", refuse)
    events = []
    train(make_lora(), tokenizer, rows_of(LENGTHS), settings(), listeners=[events.append])
    told = [event.message for event in events if isinstance(event, Notice)]
    assert len(told) == 1
    assert "No space left on device; training goes on" in told[0]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]  # 3 never fitted, nor what waits


def test_warmup_longer_than_the_run_is_an_error(make_lora, tokenizer, rows_of, settings):
    config = settings(max_steps=-1, num_train_epochs=1, warmup_steps=100)
    with pytest.raises(ConfigError, match="warmup_steps 100 is more than the run's 3 steps"):
        train(make_lora(), tokenizer, rows_of(LENGTHS), config)


def test_finished_run_is_not_overwritten(make_lora, tokenizer, rows_of, settings, tmp_path):
    train(make_lora(), tokenizer, rows_of(LENGTHS), settings(max_steps=2))
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="already holds a finished run"):
        train(make_lora(), tokenizer, rows_of(LENGTHS), settings())
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(DataError):  # before anything of the old run is removed
        train(make_lora(), tokenizer, "missing.jsonl", settings(overwrite_output_dir=True))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    train(make_lora(), tokenizer, rows_of(LENGTHS), settings(overwrite_output_dir=True))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_nan_stops_the_run_and_poisons_nothing(make_lora, tokenizer, rows_of, settings, tmp_path):
    model = make_lora()
    events = []

    def poison(event):
        events.append(event)
        if isinstance(event, StepFinished) and event.step == 3:
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"step 4: the loss of .* in rows .* of the data"):
        train(model, tokenizer, rows_of(LENGTHS), settings(save_steps=2), listeners=[poison])
    out = tmp_path / "out"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / "adapter_model.safetensors").exists()
    assert isinstance(events[-1], TrainingStopped)


def test_rows_lost_in_the_middle_end_the_run_in_their_own_step(
    make_lora, tokenizer, rows_of, settings, tmp_path, monkeypatch
):
    """They are asked for while the step before is at work, which is finished and saved."""
    load, events = BatchPlan.step, []

    def lose(plan, epoch, index):
        if index == 2:
            raise DataError("row 7 is gone")
        return load(plan, epoch, index)

    monkeypatch.setattr(BatchPlan, "step", lose)
    with pytest.raises(DataError, match="row 7 is gone"):
        train(
            make_lora(), tokenizer, rows_of(LENGTHS), settings(save_steps=1),
            listeners=[events.append],
        )  # fmt: skip
    assert [event.step for event in events if isinstance(event, StepFinished)] == [1, 2]
    assert kinds(events).count(TrainingStopped) == 1
    assert (tmp_path / "out" / "checkpoint-2" / "manifest.json").exists()


def test_directory_lost_in_the_middle_is_an_error(
    make_lora, tokenizer, rows_of, settings, tmp_path
):
    def lose(event):
        if isinstance(event, StepFinished) and event.step == 2:
            shutil.rmtree(tmp_path / "out")

    with pytest.raises(CheckpointError, match=r"metrics.jsonl failed: No such file"):
        train(make_lora(), tokenizer, rows_of(LENGTHS), settings(), listeners=[lose])


def test_other_precision_than_asked_for_is_noted(make_lora, tokenizer, rows_of, settings):
    events = []
    train(
        make_lora(),
        tokenizer,
        rows_of(LENGTHS),
        settings(max_steps=1, bf16=True),
        listeners=[events.append],
    )
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert notices == [
        "the model was loaded for torch.float32, and trains in that, not in torch.bfloat16"
    ]
