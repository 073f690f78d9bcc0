"""halfbyte verify-resume: a real kill and a real comparison, with a verdict that can be trusted."""

import signal
import subprocess
import sys

import pytest

from halfbyte.cli import verify_resume as module
from halfbyte.cli.verify_resume import short_run
from halfbyte.config import RunConfig


@pytest.mark.parametrize("kill_at", [1, 6, 9])
def test_a_kill_that_proves_nothing_is_refused(run, config, kill_at):
    result = run("verify-resume", config, "--steps", 6, "--kill-at", kill_at)
    assert result.exit_code == 2
    assert f"expected --kill-at from 3 to 5 for 6 steps, got {kill_at}" in result.stderr


def test_short_run_keeps_what_decides_the_bits(config, tmp_path):
    base = RunConfig.from_yaml(
        config, ["report_to=wandb", "eval_fraction=0.25", "warmup_steps=2", "seed=7"]
    )
    short = short_run(base, tmp_path / "x", 6, resume=True)
    assert short.lora == base.lora
    assert short.data == base.data
    assert (short.train.seed, short.train.learning_rate) == (7, base.train.learning_rate)
    assert (short.train.max_steps, short.train.save_steps) == (6, 1)
    assert (short.train.eval_strategy, short.train.report_to) == ("no", ())
    assert short.train.resume_from_checkpoint == "auto"
    assert RunConfig.from_dict(short.model_dump()) == short


def test_what_the_child_says_is_passed_on(run, config, monkeypatch):
    """The data are gone when the first of the three runs looks for them."""
    child = "import sys; print('error: there is no file'); print('hint: look'); sys.exit(2)"
    monkeypatch.setattr(module, "_CHILD", child)
    result = run("verify-resume", config)
    assert result.exit_code == 2
    assert "'1/3 undisturbed, 6 steps' ended with exit code 2 and not 0" in result.stderr
    assert "error: there is no file" in result.stderr


@pytest.mark.slow
def test_it_proves_that_a_killed_run_resumes(config, tmp_path):
    """Three processes, one of them killed by SIGKILL."""
    command = [sys.executable, "-m", "halfbyte", "verify-resume", str(config)]
    settings = ["deterministic=true", "lora_dropout=0.1", "max_steps=50", "--steps", "5"]
    done = subprocess.run(
        [*command, *settings], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adapter         28 tensors" in done.stdout
    assert done.stdout.count("equal, bit for bit") == 3
    assert "verdict: killed after step 3 and resumed, this run ends with the same bits" in (
        done.stdout
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_child_was_killed(config, tmp_path):
    short = short_run(RunConfig.from_yaml(config), tmp_path / "cut", 6, resume=False)
    path = tmp_path / "cut.yaml"
    path.write_text(short.to_yaml())
    command = [sys.executable, "-c", module._CHILD, str(path), "4"]
    done = subprocess.run(command, capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes().count(b"\n") == 4
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
