import pytest
from pydantic import ValidationError

from halfbyte.data.config import DataConfig


def test_defaults_are_those_of_the_documentation():
    config = DataConfig(path="train.jsonl")
    assert config.max_length == 1024
    assert config.over_length == "error"
    assert config.loss_on == "assistant"
    assert config.format == "auto"
    assert not config.packing


def test_unknown_settings_and_values_are_refused():
    with pytest.raises(ValidationError, match="max_lenght"):
        DataConfig(path="a", max_lenght=5)
    with pytest.raises(ValidationError, match="over_length"):
        DataConfig(path="a", over_length="cut")
    with pytest.raises(ValidationError, match="eval_fraction"):
        DataConfig(path="a", eval_fraction=1.0)


def test_two_kinds_of_held_out_rows_are_refused():
    with pytest.raises(ValidationError, match="keep one"):
        DataConfig(path="a", eval_path="b", eval_fraction=0.1)


def test_it_does_not_change():
    config = DataConfig(path="a")
    with pytest.raises(ValidationError, match="frozen"):
        config.max_length = 5


def test_paths_are_text(tmp_path):
    config = DataConfig(path=tmp_path / "a.jsonl", cache_dir=tmp_path)
    assert config.path == str(tmp_path / "a.jsonl")
    assert config.model_dump()["cache_dir"] == str(tmp_path)
