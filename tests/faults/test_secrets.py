"""No secret that a run is given stands in what it prints, logs or writes."""

import json
import logging

import pytest
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.models.load import load

TOKEN = "hf_" + "A1b2C3d4E5" * 3 + "wxyz"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def config(tmp_path, tiny_base, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, TOKEN)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "2+2?", "completion": "4"}) + "\n")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {tiny_base}\npath: {tmp_path / 'rows.jsonl'}\ncache_dir: {tmp_path / 'cache'}\n"
        f"output_dir: {tmp_path / 'out'}\nmax_steps: 2\nsave_steps: 1\nr: 2\n"
    )
    return path


def written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_tokens_of_the_environment_stay_there(config, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        result = CliRunner().invoke(app, ["--debug", "train", str(config)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "run.json").exists()
    assert list((tmp_path / "out").glob("checkpoint-*"))
    assert TOKEN.encode() not in written(tmp_path)
    assert TOKEN not in result.output + caplog.text


@pytest.mark.parametrize(
    "setting", [f"run_name={TOKEN}", f"path=https://ada:{TOKEN}@host/x.jsonl", f"token={TOKEN}"]
)
def test_tokens_in_settings_are_refused_and_not_repeated(config, tmp_path, setting):
    result = CliRunner().invoke(app, ["train", str(config), setting])
    assert result.exit_code == 2
    assert "a password or an access token" in result.output
    assert TOKEN not in result.output
    assert not (tmp_path / "out").exists()


def test_a_token_given_to_load_is_not_saved(tiny_base, tmp_path):
    model, tokenizer = load(tiny_base, quant=None, token=TOKEN)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert TOKEN.encode() not in written(tmp_path)
    assert TOKEN not in repr(model.config) + repr(tokenizer)
