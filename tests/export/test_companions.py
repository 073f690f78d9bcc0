"""Tokenizer, template and settings come along; quantization and code do not."""

import json

import torch

from halfbyte.export.companions import copy_companions, write_config


def test_the_tokenizer_beside_the_adapter_wins_as_a_whole(tiny_base, tmp_path):
    adapter, to = tmp_path / "adapter", tmp_path / "to"
    adapter.mkdir()
    to.mkdir()
    (adapter / "tokenizer_config.json").write_text("{}")
    (adapter / "tokenizer.json").write_text("mine")
    copy_companions(adapter, tiny_base, to)
    assert (to / "tokenizer.json").read_text() == "mine"
    assert not (to / "chat_template.jinja").exists()
    assert (to / "generation_config.json").is_file()


def test_without_one_the_bases_comes(tiny_base, tmp_path):
    to = tmp_path / "to"
    to.mkdir()
    copy_companions(tmp_path, tiny_base, to)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {
        path.name for path in to.iterdir()
    }
    assert not list(to.glob("*.safetensors"))


def test_code_is_not_copied(tmp_path):
    base, to = tmp_path / "base", tmp_path / "to"
    base.mkdir()
    to.mkdir()
    (base / "tokenizer_config.json").write_text("{}")
    (base / "tokenizer_code.py").write_text("evil()")
    copy_companions(tmp_path, base, to)
    assert [path.name for path in to.iterdir()] == ["tokenizer_config.json"]


def test_config_is_that_of_a_plain_model(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    saved = {
        "model_type": "x",
        "quantization_config": {},
        "torch_dtype": "float16",
        "vocab_size": 5,
    }
    (base / "config.json").write_text(json.dumps(saved))
    write_config(base, tmp_path, torch.bfloat16, {"vocab_size": 7, "tie_word_embeddings": False})
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "x",
        "dtype": "bfloat16",
        "vocab_size": 7,
        "tie_word_embeddings": False,
    }


def test_nested_settings_change_where_they_stand(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 5}}))
    write_config(base, tmp_path, torch.float32, {"vocab_size": 7})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"dtype": "float32", "text_config": {"vocab_size": 7}}
