"""Run the benchmarks, ours and the peers', side by side; write a JSON file and a Markdown table.

    python benchmarks/run.py                       # everything that this machine can run
    python benchmarks/run.py --only steps --quick  # a group or cases by name; fewer steps
    python benchmarks/run.py --list

All contestants load one random bf16 checkpoint, which is made first and deleted at the end
(`--checkpoint DIR` keeps one or uses one that is there). Each case has a process of its own: one
that fails, runs out of memory or out of time is a row of the table and not the end. What cannot run
here is a row that says why. The file is written after every case, and a case that is in it is not
run again, so that an interrupted run goes on where it was; `--again` runs it anyway.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cases import CASES, Case
from table import markdown

HERE = Path(__file__).parent
MODULES = [
    "halfbyte",
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "unsloth",
    "trl",
    "liger_kernel",
]


def machine() -> dict:
    """Return card, driver, versions and commit, from a process that then lets go of the card."""
    source = (
        "import json, platform, sys, importlib.metadata as m, torch\n"
        "on_gpu = torch.cuda.is_available()\n"
        "versions = {'python': platform.python_version(), 'cuda': torch.version.cuda}\n"
        "for name in sys.argv[1:]:\n"
        "    try: versions[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps({'card': torch.cuda.get_device_name() if on_gpu else None,"
        " 'memory_gib': round(torch.cuda.mem_get_info()[1] / 2**30, 1) if on_gpu else None,"
        " 'versions': versions}))\n"
    )
    command = [sys.executable, "-c", source, *MODULES]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    cpu = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    return {
        "date": datetime.date.today().isoformat(), **found,
        "cpu": f"{os.cpu_count()} cores, {cpu.group(1) if cpu else 'unknown'}",
        "commit": commit(), "command": shlex.join(["run.py", *sys.argv[1:]]),
    }  # fmt: skip


def commit() -> str | None:
    """Return the commit that this is, with "-dirty" where files differ, or None."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(
            command, cwd=HERE, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def card_folder(card: str | None) -> str:
    """Return the name of a card's folder, such as h100 of "NVIDIA H100 80GB HBM3"."""
    found = re.search(r"\b(?=\w*\d)(?=[A-Za-z])\w+", card or "")
    return found.group().lower() if found else "cpu"


def obstacle(case: Case, has_gpu: bool) -> str | None:  # noqa: FBT001
    """Return why the case cannot run here, or None."""
    for need in case.needs:
        if need == "gpu" and not has_gpu:
            return "needs a CUDA device"
        if need not in ("gpu", "checkpoint") and importlib.util.find_spec(need) is None:
            return f"needs {need}, which is not installed"
    return None


def run_case(command: list[str], timeout_s: float) -> dict:
    """Run a script; return its JSON lines, its seconds, and its last words where it failed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, str(HERE / command[0]), *command[1:]], stdout=subprocess.PIPE,
            stderr=said, text=True, start_new_session=True,
        )  # fmt: skip
        status = "ok"
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            status = f"ended after {timeout_s:.0f} s"
            _end(process)
            output, _ = process.communicate()
        except BaseException:
            _end(process)
            raise
        said.seek(0)
        words = said.read().strip().splitlines()
    if status == "ok" and process.returncode != 0:
        status = f"failed with exit code {process.returncode}"
    found = {
        "command": shlex.join(["python", f"benchmarks/{command[0]}", *command[1:]]),
        "status": status,
        "seconds": round(time.perf_counter() - start, 2), "rows": json_rows(output),
    }  # fmt: skip
    return found if status == "ok" else found | {"said": words[-3:]}


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def json_rows(output: str) -> list[dict]:
    """Return the lines that are JSON objects."""
    rows = []
    for line in output.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def chosen(only: str | None, *, quick: bool) -> list[Case]:
    """Return the cases of these names or groups, in their order.

    Raises:
        SystemExit: A name is neither.
    """
    names = set(only.split(",")) if only else set()
    unknown = names - {case.name for case in CASES} - {case.group for case in CASES}
    if unknown:
        raise SystemExit(f"no case and no group is called {', '.join(sorted(unknown))}: see --list")
    return [
        case
        for case in CASES
        if (not names or {case.name, case.group} & names)
        and (case.name in names or not quick or case.is_quick)
    ]


def begun(path: Path) -> dict:
    """Return what an earlier run wrote, or an empty result.

    Raises:
        SystemExit: The file is something else.
    """
    if not path.exists():
        return {"cases": {}}
    found = json.loads(path.read_text(encoding="utf-8"))
    if "cases" not in found:
        raise SystemExit(f"{path} was not written by this script: give another --out")
    return found


def save(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (path, json.dumps(result, indent=1) + "\n"),
        (path.with_suffix(".md"), markdown(result)),
    ):
        partial = target.with_name(target.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)


def run_all(cases: list[Case], args: argparse.Namespace) -> Path:
    """Run the cases and return the path of the result."""
    facts = machine()
    folder = HERE / "results" / card_folder(facts["card"])
    path = args.out or folder / f"{facts['date']}.json"
    result = begun(path)
    result |= {"machine": facts}
    with contextlib.ExitStack() as stack:
        checkpoint = args.checkpoint
        if checkpoint is None:
            checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint"
        for number, case in enumerate(cases, 1):
            label = f"[{number}/{len(cases)}] {case.name}"
            before = result["cases"].get(case.name)
            if before is not None and before["status"] == "ok" and not args.again:
                print(f"{label}: done before", flush=True)
                continue
            why = obstacle(case, facts["card"] is not None)
            if why is not None:
                result["cases"][case.name] = {"group": case.group, "status": f"skipped: {why}"}
                print(f"{label}: skipped, {why}", flush=True)
                continue
            if "checkpoint" in case.needs and not (checkpoint / "config.json").exists():
                print("making the random checkpoint", flush=True)
                made = run_case(["random_checkpoint.py", str(checkpoint.resolve())], 600)
                if made["status"] != "ok":
                    raise SystemExit("\n".join(["no checkpoint:", *made["said"]]))
            settings = {"checkpoint": str(checkpoint.resolve()), "steps": 3 if args.quick else 6}
            command = shlex.split(case.command.format(**settings))
            found = run_case(command, min(case.timeout_s, args.timeout))
            result["cases"][case.name] = {"group": case.group, **found}
            print(f"{label}: {found['status']}, {found['seconds']} s", flush=True)
            save(path, result)
    save(path, result)
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="cases or groups, with commas between")
    parser.add_argument("--quick", action="store_true", help="the main cases, with fewer steps")
    parser.add_argument("--again", action="store_true", help="also what the file has already")
    parser.add_argument("--out", type=Path, help="by default results/<card>/<date>.json")
    parser.add_argument("--checkpoint", type=Path, help="a random checkpoint, made if missing")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a case may take")
    parser.add_argument("--list", action="store_true", help="name the cases and what they need")
    args = parser.parse_args(argv)
    cases = chosen(args.only, quick=args.quick)
    if args.list:
        for case in cases:
            print(f"{case.group:10} {case.name:22} {', '.join(case.needs):32} {case.command}")
        return
    path = run_all(cases, args)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
