"""A run to call the command line on: tiny base, a few rows, one YAML file."""

import json
import shutil

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


def write_rows(folder):
    """Write sixteen rows of question and answer."""
    path = folder / "data.jsonl"
    rows = [{"question": f"{i % 4}?", "answer": f"#### {i % 4}"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder, base, data):
    """Write a YAML file that trains two steps."""
    path = folder / "run.yaml"
    path.write_text(
        f"model: {base}\npath: {data}\n{COLUMNS.replace('=', ': ')}\n"
        "output_dir: out\nmax_steps: 2\nr: 4\nlearning_rate: 1e-2\n"
    )
    return path


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path)


@pytest.fixture
def config(tmp_path, tiny_base, data):
    return write_config(tmp_path, tiny_base, data)


@pytest.fixture(scope="session")
def train_once(tmp_path_factory):
    """Return a function that gives the folder of a finished run, trained once for each base."""
    folders = {}

    def train(base):
        if base not in folders:
            folder = tmp_path_factory.mktemp("trained")
            config = write_config(folder, base, write_rows(folder))
            arguments = ["train", str(config), f"output_dir={folder / 'out'}"]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            folders[base] = folder / "out"
        return folders[base]

    return train


@pytest.fixture
def run_on(train_once, data, tmp_path):
    """Return a function that puts a finished run on a base here, as if it was trained here."""

    def copy(base):
        finished, out = train_once(base), tmp_path / "out"
        shutil.copytree(finished, out)
        settings = out / "run.yaml"
        settings.write_text(settings.read_text().replace(str(finished.parent), str(tmp_path)))
        return out

    return copy


@pytest.fixture
def trained(run_on, tiny_base):
    """Folder of a finished run."""
    return run_on(tiny_base)
