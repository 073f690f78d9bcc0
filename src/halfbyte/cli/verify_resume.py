"""halfbyte verify-resume: proof, on this machine, that a killed run resumes bit for bit.

Three short runs of the user's own settings, each in a process of its own:

    whole      steps 1 to N
    killed     steps 1 to K, then SIGKILL, which no process can catch
    resumed    from the newest checkpoint that the killed one left, to N

Then adapter, optimizer state and the measures of every step of the first and the last are compared.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.errors import ConfigError, HalfbyteError, TrainingError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from halfbyte.config import RunConfig
    from halfbyte.train.events import Listener

DIFFERENT = 1
"""Exit code where the runs differ; 0 is equal, 2 says that they could not be compared."""

_FIRST_KILL = 3  # one checkpoint is published by then: writing is at most one step behind
_POLL_SECONDS = 0.1
_CHILD = (
    "import sys; from halfbyte.cli.verify_resume import run_child; "
    "run_child(sys.argv[1], int(sys.argv[2]))"
)


def verify_resume(
    config: Annotated[Path, typer.Argument(help="A YAML file, as for `halfbyte train`.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, over those in the file.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the whole run.", min=4)] = 6,
    kill_at: Annotated[
        int | None, typer.Option(help="Kill after this step; by default in the middle.")
    ] = None,
) -> None:
    """Prove by a short run that a killed run resumes bit for bit here.

    Trains three times for a few steps in a temporary directory: undisturbed, killed, resumed.
    Exit code 0: the same bits; 1: they differ, and it is said where and why; 2: it could not be
    tried. Without `deterministic: true` a GPU may give other bits even to undisturbed runs.
    """
    from halfbyte.cli.display import print_facts, quieten

    quieten()
    from halfbyte.config import RunConfig
    from halfbyte.train.compare import compare_runs

    kill_at = max(_FIRST_KILL, steps // 2) if kill_at is None else kill_at
    if not _FIRST_KILL <= kill_at < steps:
        raise ConfigError(
            f"expected --kill-at from {_FIRST_KILL} to {steps - 1} for {steps} steps, got {kill_at}"
        )
    base = RunConfig.from_yaml(config, list(settings or []))
    with tempfile.TemporaryDirectory(prefix="halfbyte-verify-resume-") as name:
        folder = Path(name)
        whole, cut = folder / "whole", folder / "cut"
        _train(base, whole, steps, title=f"1/3 undisturbed, {steps} steps")
        _train(base, cut, steps, title=f"2/3 killed after step {kill_at}", kill_at=kill_at)
        _train(base, cut, steps, title=f"3/3 resumed, to step {steps}", resume=True)
        comparison = compare_runs(whole, cut, step=steps)
    facts = {"deterministic": str(base.train.deterministic).lower(), **comparison.facts}
    print_facts("whole run and resumed run", facts)
    print(f"verdict: {comparison.verdict(kill_at, deterministic=base.train.deterministic)}")
    if not comparison.is_equal:
        raise typer.Exit(DIFFERENT)


def run_child(config: str, kill_at: int) -> None:
    """Train as a YAML file says; after step `kill_at` (0: never) kill this process."""
    from halfbyte.cli.errors import USAGE_ERROR, report
    from halfbyte.cli.train import run
    from halfbyte.config import RunConfig

    try:
        run(RunConfig.from_yaml(config), listeners=[_killer(kill_at)])
    except HalfbyteError as error:
        report(error)
        sys.exit(USAGE_ERROR)


def _killer(step: int) -> "Listener":
    from halfbyte.train.events import StepFinished, StepSkipped

    def listen(event: Any) -> None:
        if isinstance(event, StepFinished | StepSkipped) and event.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return listen


def short_run(base: "RunConfig", output_dir: Path, steps: int, *, resume: bool) -> "RunConfig":
    """Return the user's settings for a short run that only trains and saves."""
    changes = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "warmup_steps": min(base.train.warmup_steps, steps),
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "eval_on_start": False,
        "overwrite_output_dir": False,
        "resume_from_checkpoint": "auto" if resume else None,
        "report_to": (),
        "disable_tqdm": True,
    }
    train = type(base.train)(**{**base.train.model_dump(), **changes})
    return base.model_copy(update={"train": train})


def _train(
    base: "RunConfig",
    output_dir: Path,
    steps: int,
    *,
    title: str,
    kill_at: int = 0,
    resume: bool = False,
) -> None:
    """Run one of the three in a process of its own, and show how far it is."""
    from halfbyte.cli.display import progress_bar

    path = output_dir.with_suffix(".yaml")
    config = short_run(base, output_dir, steps, resume=resume)
    path.write_text(config.to_yaml(), encoding="utf-8")
    started = time.monotonic()
    with output_dir.with_suffix(".log").open("w+", encoding="utf-8") as log, progress_bar() as bar:
        task = bar.add_task(title, total=kill_at or steps)
        command = [sys.executable, "-c", _CHILD, str(path), str(kill_at)]
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
            try:
                code = _watch(process, output_dir / "metrics.jsonl", bar, task)
            finally:
                process.kill()
        log.seek(0)
        _check_end(title, code, log.read(), expected=-signal.SIGKILL if kill_at else 0)
    print(f"{title}: {time.monotonic() - started:.0f} s", flush=True)


def _watch(process: subprocess.Popen, metrics: Path, bar: "Progress", task: "TaskID") -> int:
    while (code := process.poll()) is None:
        if metrics.exists():
            bar.update(task, completed=metrics.read_bytes().count(b"\n"))
        time.sleep(_POLL_SECONDS)
    return code


def _check_end(title: str, code: int, output: str, *, expected: int) -> None:
    """Find a run that ended otherwise than it should.

    Raises:
        TrainingError: with what it said last.
    """
    if code == expected:
        return
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error: ", "hint: "))]
    raise TrainingError(
        f"the run {title!r} ended with exit code {code} and not {expected}:\n"
        + "\n".join(errors or lines[-5:]),
        hint="`halfbyte train` with the same settings shows more",
    )
