"""halfbyte serve: mistakes are said before anything is loaded; a server from the shell."""

import os
import signal
import subprocess
import sys

import openai
import pytest

from halfbyte.cli.serve import read_api_key
from halfbyte.errors import ConfigError


def test_the_api_key_comes_from_one_place(monkeypatch, tmp_path):
    monkeypatch.setenv("KEY", " sesame\n")
    file = tmp_path / "key"
    file.write_text("open\n")
    assert read_api_key("KEY", None) == "sesame"
    assert read_api_key(None, file) == "open"
    assert read_api_key(None, None) is None
    with pytest.raises(ConfigError, match="not both"):
        read_api_key("KEY", file)
    with pytest.raises(ConfigError, match="environment variable NOKEY, found none"):
        read_api_key("NOKEY", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_key(None, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", 70000], "port should be"),
        (["--max-batch-size", 0], "max_batch_size"),
        (["--adapter-dir", "nowhere"], "--adapter-dir should be a folder"),
        (["--adapter", "a=x", "--adapter", "a=y"], "name of its own"),
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
)
def test_wrong_options_are_said_before_anything_is_loaded(run, options, said):
    result = run("serve", "./nowhere", *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_other_machines_without_a_key_are_warned_of(run):
    result = run("serve", "./nowhere", "--host", "0.0.0.0")
    assert result.exit_code == 2
    assert "anybody who reaches 0.0.0.0" in result.stderr


def test_vllms_command_is_printed(run, tiny_base):
    result = run("serve", tiny_base, "--print-vllm", "--max-model-len", 128)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"vllm serve {tiny_base} --max-model-len 128\n"


@pytest.mark.slow
def test_a_run_is_served_until_a_signal(trained):
    command = [sys.executable, "-m", "halfbyte", "serve", str(trained), "--port", "0"]
    environment = {**os.environ, "KEY": "sesame"}
    with subprocess.Popen(
        [*command, "--adapter", f"more={trained}", "--api-key-env", "KEY"],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        url = process.stdout.readline().split()[-1]
        models = process.stdout.readline()
        client = openai.OpenAI(base_url=url, api_key="sesame", max_retries=0)
        names = [model.id for model in client.models.list()]
        assert names[1:] == ["out", "more"]
        assert all(name in models for name in names)
        messages = [{"role": "user", "content": "1?"}]
        for name in names:
            client.chat.completions.create(model=name, messages=messages, max_tokens=3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
