"""A run to call the command line on: tiny base, a few rows, one YAML file."""

import json

import pytest
from typer.testing import CliRunner

from halfbyte.cli.main import app

COLUMNS = "columns={prompt: question, completion: answer}"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that calls `halfbyte` with arguments, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, **options):
        return CliRunner().invoke(app, [str(part) for part in arguments], **options)

    return call


@pytest.fixture
def data(tmp_path):
    """Sixteen rows of question and answer."""
    path = tmp_path / "data.jsonl"
    rows = [{"question": f"{i % 4}?", "answer": f"#### {i % 4}"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path, tiny_base, data):
    """A YAML file that trains two steps."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {tiny_base}\npath: {data}\n{COLUMNS.replace('=', ': ')}\n"
        "output_dir: out\nmax_steps: 2\nr: 4\nlearning_rate: 1e-2\n"
    )
    return path


@pytest.fixture
def trained(run, config, tmp_path):
    """Folder of a finished run."""
    result = run("train", config)
    assert result.exit_code == 0, result.output
    return tmp_path / "out"
