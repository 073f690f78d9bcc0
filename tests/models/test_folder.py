import pytest
from huggingface_hub.utils import filter_repo_objects

from halfbyte.errors import CheckpointError
from halfbyte.models import folder
from halfbyte.models.folder import find_folder

FILES = [
    "config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "pytorch_model.bin",
    "modeling_evil.py",
    "consolidated.00.safetensors",
    "original/model.safetensors",
    "model.gguf",
]


def test_a_folder_is_itself(tmp_path):
    assert find_folder(tmp_path) == tmp_path
    assert find_folder(str(tmp_path)) == tmp_path


def test_a_file_is_none(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="is no folder"):
        find_folder(tmp_path / "model.safetensors")


def test_the_hub_gives_what_is_read_and_nothing_else(tmp_path, monkeypatch):
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr(folder, "snapshot_download", download)
    assert find_folder("someone/model", revision="abc") == tmp_path
    assert (asked["name"], asked["revision"]) == ("someone/model", "abc")
    chosen = filter_repo_objects(
        FILES, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(chosen) == FILES[:7]
    find_folder("someone/model", with_weights=False)
    chosen = filter_repo_objects(FILES, allow_patterns=asked["allow_patterns"])
    assert list(chosen) == [name for name in FILES[:7] if "00001" not in name]


def test_a_name_that_the_hub_does_not_have():
    with pytest.raises(CheckpointError, match="the hub does not give it") as caught:
        find_folder("nobody/nothing-of-the-kind")
    assert "hf auth login" in caught.value.hint
