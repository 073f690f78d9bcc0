"""What goes to the hub, and what stays."""

import json
from types import SimpleNamespace

import pytest

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.export import push as module
from halfbyte.export.push import push

STAYS = [".env", ".lock", "cache", "checkpoint-10", "optimizer.safetensors", "run.json", "run.yaml"]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "org/base"}')
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("my own card")
    (path / "checkpoint-10").mkdir()
    (path / "checkpoint-10" / "adapter_model.safetensors").write_bytes(b"old")
    (path / "cache").mkdir()
    for name in (".env", ".lock", "optimizer.safetensors", "run.json", "run.yaml"):
        (path / name).write_text("hf_" + "a" * 34)
    return path


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub; holds what it was asked."""
    asked = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo, **settings):
            asked["create"] = repo, settings
            return type("Url", (str,), {"repo_id": repo})(f"https://hub/{repo}")

        def upload_folder(self, **settings):
            asked["upload"] = SimpleNamespace(**settings)

    monkeypatch.setattr(module, "HfApi", Api)
    return asked


def test_a_dry_run_lists_files_and_touches_nothing(folder, hub):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = push(folder, "me/model", dry_run=True)
    assert result.files == {
        "README.md": 11,
        "adapter_config.json": 47,
        "adapter_model.safetensors": 7,
        "tokenizer.json": 2,
    }
    assert result.left_out == STAYS
    assert result.url is None
    assert not hub
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_only_what_was_listed_is_uploaded(folder, hub):
    result = push(folder, "me/model", private=True)
    assert hub["create"] == ("me/model", {"private": True, "exist_ok": True})
    assert hub["upload"].repo_id == "me/model"
    assert hub["upload"].allow_patterns == list(result.files)
    assert result.url == "https://hub/me/model"
    assert (folder / "README.md").read_text() == "my own card"


def test_a_card_is_written_where_there_is_none(folder, hub):
    (folder / "README.md").unlink()
    assert "README.md" in push(folder, "me/model").files


@pytest.mark.parametrize(
    "secret", ["hf_" + "x" * 34, "AKIA" + "Q" * 16, "-----BEGIN RSA PRIVATE KEY-----"]
)
def test_a_secret_stops_it(folder, hub, secret):
    (folder / "metrics.jsonl").write_text(f'{{"token": "{secret}"}}')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl holds what looks like"):
        push(folder, "me/model")
    assert not hub


def test_links_are_not_followed(folder, hub, tmp_path):
    (tmp_path / "elsewhere").write_text("private")
    (folder / "merges.txt").symlink_to(tmp_path / "elsewhere")
    result = push(folder, "me/model", dry_run=True)
    assert "merges.txt" in result.left_out


def test_a_base_on_this_machine_is_said(folder, hub, tmp_path):
    config = {"r": 8, "base_model_name_or_path": str(tmp_path)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "folder of this machine" in push(folder, "me/model", dry_run=True).notices[0]


def test_errors_say_what_to_do(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no name on the hub"):
        push(folder, "no such/name/here", dry_run=True)
    with pytest.raises(CheckpointError, match="is no folder"):
        push(tmp_path / "nowhere", "me/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights to upload"):
        push(tmp_path / "empty", "me/model", dry_run=True)

    def refuse(**_):
        raise ValueError("401 not you\nlong story")

    monkeypatch.setattr(
        module, "HfApi", lambda **_: SimpleNamespace(create_repo=lambda *_, **__: refuse())
    )
    with pytest.raises(CheckpointError, match="run: 401 not you") as caught:
        push(folder, "me/model")
    assert "hf auth login" in caught.value.hint
