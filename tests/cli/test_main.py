"""The command itself: its verbs, its help, and what it does not do yet."""

import subprocess
import sys

import pytest

VERBS = [
    *("doctor", "demo", "audit", "plan", "quantize", "train", "verify-resume", "evaluate"),
    *("generate", "chat", "merge", "export", "push", "serve", "version"),
]


def test_help_lists_the_verbs_that_exist(run):
    result = run("--help")
    assert result.exit_code == 0
    for verb in VERBS:
        assert verb in result.output
    for later in ("sweep", "report"):
        assert f" {later} " not in result.output


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run, verb):
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_an_unknown_verb_is_a_usage_error(run):
    result = run("trian")
    assert result.exit_code == 2
    assert "train" in result.output


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom halfbyte.cli.main import main\nsys.argv = ['halfbyte', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().count(".") == 2
