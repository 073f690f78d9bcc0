"""Killed at random moments and resumed each time, a run ends with the bits of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("kill_harness.py")


def kill(folder, kills, number, timeout):
    command = [sys.executable, "-W", "ignore", str(HARNESS), str(folder), str(kills), "0", number]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] >= kills
    assert counts["finished"] >= 1
    return counts


def test_case_70_a_handful_of_kills(tmp_path):
    kill(tmp_path, 2, "SIGKILL", timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_case_70_two_hundred_kills(tmp_path):
    counts = kill(tmp_path, 200, "SIGKILL", timeout=850)
    assert counts["checkpoints_seen"] > 200
    assert counts["half_written"] > 0  # some came in the middle of a checkpoint


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_case_87_two_hundred_signals(tmp_path):
    counts = kill(tmp_path, 200, "SIGTERM", timeout=850)
    assert 0 < counts["saved_and_left"] < counts["killed"]  # some came before the first step
