"""halfbyte train: one file, one run; what is wrong is said before anything is written."""

import json
import os
import signal
import subprocess
import sys

import pytest

from halfbyte.cli import train as module
from halfbyte.config import RunConfig
from halfbyte.train.events import StepFinished

WRONG = {
    "a missing data file": (
        {"path": "missing.jsonl"},
        "there is no file or folder missing.jsonl",
        "check the path",
    ),
    "no data at all": ({"path": None}, "`path` is not set", "set `path`"),
    "a missing base": ({"model": "./nowhere"}, "expected the folder of a model", "check the path"),
    "an unknown key": ({"learning_rat": 1}, "unknown key 'learning_rat'", "learning_rate"),
    "a misspelt target": (
        {"target_modules": ["q_prj"]},
        "the target 'q_prj' matches no layer",
        "q_proj",
    ),
    "a wrong value": ({"learning_rate": "fast"}, "train.learning_rate", ""),
    "other columns": (
        {"columns": {"prompt": "query", "completion": "answer"}},
        "columns` says prompt: query, but the columns are question, answer",
        "{role: column}",
    ),
    "rows that are too long": ({"max_length": 8}, "max_length", ""),
    "eight bits on a CPU": ({"compute": "fp8"}, "compute capability 8.9", "bf16"),
    "an optimizer that is not there": ({"optim": "sgd"}, "paged_adamw_32bit", ""),
}


def lines_of(result):
    """Return the error and hint lines, which must be all that stderr holds of it."""
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    hints = [line for line in result.stderr.splitlines() if line.startswith("hint: ")]
    assert len(errors) == 1, result.output
    return errors[0], "".join(hints)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_said_in_one_line_and_leave_nothing(run, config, tmp_path, name):
    settings, message, hint = WRONG[name]
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    result = run("train", config, *overrides)
    error, advice = lines_of(result)
    assert result.exit_code == 2
    assert message in error
    assert hint in advice
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.jsonl"),
        (b"\n\n", "data.jsonl"),
        (b'{"question": "a", "answer": "\xff"}\n', "UTF-8"),
        (b'{"question": "a", "answer": "b"}\n{"question": "c"}\n', "answer"),
        (b'{"other": 1}\n', "other"),
        (b'{"question": "a", \n', "line 1"),
    ],
    ids=["empty", "blank", "not UTF-8", "row without a column", "other columns", "broken JSON"],
)
def test_wrong_data_are_said_in_one_line_and_leave_nothing(
    run, config, data, tmp_path, content, message
):
    data.write_bytes(content)
    result = run("train", config)
    error, _ = lines_of(result)
    assert result.exit_code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_base_without_template_says_which_to_take(run, config, make_base, tmp_path):
    base = make_base()
    (base / "chat_template.jinja").unlink()
    result = run("train", config, f"model={base}")
    error, hint = lines_of(result)
    assert result.exit_code == 2
    assert "no chat template" in error
    assert "chatml" in hint
    assert not (tmp_path / "out").exists()
    assert run("train", config, f"model={base}", "chat_template=chatml").exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [", "line"), ("", "holds nothing"), (None, "cannot be read")],
    ids=["broken", "empty", "missing"],
)
def test_wrong_yaml_is_said_in_one_line(run, tmp_path, text, message):
    path = tmp_path / "other.yaml"
    if text is not None:
        path.write_text(text)
    result = run("train", path)
    error, _ = lines_of(result)
    assert result.exit_code == 2
    assert message in error


def test_it_trains_and_says_what_it_did(run, config, tmp_path):
    result = run("train", config, "eval_fraction=0.25", "quant=none")
    assert result.exit_code == 0, result.output
    for said in ("learned tokens", "16 bits", "trainable", "training loss", "held-out loss"):
        assert said in result.output
    saved = RunConfig.from_yaml(tmp_path / "out" / "run.yaml")
    assert saved == RunConfig.from_yaml(config, ["eval_fraction=0.25", "quant=none"])


def test_a_finished_run_is_not_overwritten(run, config, trained):
    result = run("train", config)
    error, hint = lines_of(result)
    assert result.exit_code == 2
    assert "already holds a finished run" in error
    assert "overwrite_output_dir" in hint
    assert run("train", config, "overwrite_output_dir=true").exit_code == 0


def test_resume_goes_on(run, config, tmp_path):
    assert run("train", config, "save_steps=1").exit_code == 0
    for resume in (["--resume"], ["--resume", "auto"], ["--resume=auto"]):
        (tmp_path / "out" / "run.json").unlink()
        result = run("train", config, *resume, "save_steps=1")
        assert result.exit_code == 0, result.output


def test_resume_from_a_checkpoint_that_is_not_there(run, config):
    result = run("train", config, "--resume", "out/checkpoint-9")
    error, _ = lines_of(result)
    assert result.exit_code == 2
    assert "checkpoint-9" in error


def test_help_lists_every_setting(run):
    result = run("train", "--help")
    assert result.exit_code == 0
    for name in ("learning_rate", "lora_alpha", "double_quant", "chat_template", "--resume"):
        assert name in result.output


def test_an_interruption_says_once_how_to_go_on(run, config, tmp_path, monkeypatch):
    def stop(event):
        if isinstance(event, StepFinished):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "_record", lambda config: stop)
    result = run("train", config, "max_steps=9")
    assert result.exit_code == 143
    assert result.stderr.count("hint: ") == 1
    assert "resume_from_checkpoint=auto" in result.stderr
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_no_run(config, tmp_path):
    """`halfbyte train run.yaml | head -1`."""
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "halfbyte", "train", str(config)]
    done = subprocess.run(
        command, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path
    )
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    assert "BrokenPipe" not in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
