"""One YAML file becomes the parts' settings; whatever is wrong with it is said in one line."""

from collections import Counter

import pytest
import yaml

from halfbyte.config.run import (
    OWNERS,
    SECTIONS,
    RunConfig,
    describe_settings,
    read_data_settings,
    resolve_model,
)
from halfbyte.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_bare_keys_go_to_the_part_that_owns_them(tmp_path):
    path = write(
        tmp_path,
        """
        model: some/model
        path: train.jsonl
        columns: {prompt: question, completion: answer}
        learning_rate: 2e-4
        r: 8
        quant_type: fp4
        """,
    )
    config = RunConfig.from_yaml(path)
    assert config.data.path == "train.jsonl"
    assert config.data.columns == {"prompt": "question", "completion": "answer"}
    assert config.train.learning_rate == 2e-4
    assert config.lora.r == 8
    assert config.quant.quant_type == "fp4"


def test_sections_and_bare_keys_mix_and_the_command_line_wins(tmp_path):
    path = write(tmp_path, "model: m\nlora: {r: 4, lora_alpha: 8}\nseed: 1\npath: a.jsonl\n")
    overrides = ["r=16", "train.seed=7", "path=b=c.jsonl", "target_modules=[q_proj, v_proj]"]
    config = RunConfig.from_yaml(path, overrides)
    assert (config.lora.r, config.lora.lora_alpha) == (16, 8)
    assert config.train.seed == 7
    assert config.data.path == "b=c.jsonl"
    assert config.lora.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("value", ["none", "null", "false"])
def test_quant_none_leaves_the_base_in_16_bits(tmp_path, value):
    path = write(tmp_path, f"model: m\nquant: {value}\n")
    assert RunConfig.from_yaml(path).quant is None
    assert RunConfig.from_yaml(write(tmp_path, "model: m\n"), ["quant=none"]).quant is None


def test_every_setting_belongs_to_one_part():
    names = [name for part in SECTIONS.values() for name in part.model_fields]
    names += [name for name in RunConfig.model_fields if name not in SECTIONS]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert not set(SECTIONS) & set(OWNERS)


def test_every_setting_says_what_it_means():
    for section, settings in describe_settings().items():
        for name, _, meaning in settings:
            assert meaning, f"{section}.{name}"


def test_yaml_reads_back_as_the_same_settings(tmp_path):
    config = RunConfig.from_dict(
        {"model": "m", "quant": "none", "r": 4, "target_modules": ["q_proj"], "path": "x"}
    )
    assert RunConfig.from_yaml(write(tmp_path, config.to_yaml())) == config
    other = RunConfig.from_dict({"model": "m", "block_size": 128})
    assert RunConfig.from_yaml(write(tmp_path, other.to_yaml())) == other


def test_sections_build_what_the_parts_take():
    config = RunConfig.from_dict({"model": "m", "r": 4, "use_rslora": True, "block_size": 128})
    lora, quant = config.lora.build(), config.quant.build()
    assert (lora.r, lora.use_rslora, lora.task_type) == (4, True, "CAUSAL_LM")
    assert (quant.quant_type, quant.block_size, quant.double_quant) == ("nf4", 128, True)


def message(tmp_path, text, overrides=()):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(write(tmp_path, text), overrides)
    return caught.value.message, caught.value.hint or ""


def test_unknown_keys_are_errors_with_the_nearest_names(tmp_path):
    said, hint = message(tmp_path, "model: m\n\nlearning_rat: 1\n")
    assert "unknown key 'learning_rat'" in said
    assert "line 3" in said
    assert "learning_rate" in hint
    said, hint = message(tmp_path, "model: m\nlora:\n  rank: 8\n")
    assert "unknown key 'rank'" in said
    assert "line 3" in said
    said, _ = message(tmp_path, "model: m\n", ["tok=secret-value"])
    assert "unknown key 'tok'" in said
    assert "secret-value" not in said


def test_keys_in_the_wrong_section_are_sent_to_the_right_one(tmp_path):
    said, hint = message(tmp_path, "model: m\ntrain: {r: 8}\n")
    assert "r stands in the section train" in said
    assert "lora" in hint


def test_wrong_values_name_key_place_and_value(tmp_path):
    said, _ = message(tmp_path, "model: m\nlearning_rate: fast\n")
    assert "learning_rate" in said
    assert "line 2" in said
    assert "'fast'" in said
    said, _ = message(tmp_path, "model: m\n", ["r=0"])
    assert "lora.r (the command line)" in said
    said, _ = message(tmp_path, "path: x\n")
    assert said == "model is missing"


def test_data_may_be_a_path_alone(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: rows.jsonl\nmax_length: 99\n")
    data = RunConfig.from_yaml(file).data
    assert (data.path, data.max_length) == ("rows.jsonl", 99)
    assert RunConfig.from_yaml(file, ["path=others.jsonl"]).data.path == "others.jsonl"


def test_contradictions_are_errors(tmp_path):
    said, _ = message(tmp_path, "model: m\nquant: none\nquant_type: nf4\n")
    assert "contradict" in said


def test_broken_yaml_names_the_line(tmp_path):
    assert (
        "line 2" in message(tmp_path, "model: m\npath: [a\n")[0]
        or "line 3" in message(tmp_path, "model: m\npath: [a\n")[0]
    )
    assert "'r' stands here twice" in message(tmp_path, "model: m\nr: 1\nr: 2\n")[0]
    assert "holds nothing" in message(tmp_path, "\n")[0]
    assert "holds list" in message(tmp_path, "- a\n")[0]
    assert "key=value" in message(tmp_path, "model: m\n", ["fast"])[0]
    assert "is no YAML" in message(tmp_path, "model: m\n", ["columns={prompt: "])[0]


def test_unreadable_files_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        RunConfig.from_yaml(tmp_path / "missing.yaml")
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8: byte 7 is 0xff"):
        RunConfig.from_yaml(tmp_path / "run.yaml")


def test_numbers_may_be_written_as_in_python(tmp_path):
    path = write(tmp_path, "model: m\nlearning_rate: 1e-5\nadam_epsilon: 1.e-6\nmax_steps: 10\n")
    config = RunConfig.from_yaml(path)
    assert (config.train.learning_rate, config.train.adam_epsilon) == (1e-5, 1e-6)


def test_demo_is_the_base_inside_the_package():
    assert resolve_model("demo").endswith("base")
    assert resolve_model("owner/name") == "owner/name"


def test_folders_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("base") == str(tmp_path / "base")


def test_data_settings_alone():
    config = read_data_settings(["path=a.jsonl", "columns={prompt: q, completion: a}"])
    assert config.columns == {"prompt": "q", "completion": "a"}
    with pytest.raises(ConfigError, match="says nothing about the data"):
        read_data_settings(["path=a", "learning_rate=1"])
    with pytest.raises(ConfigError, match="max_length"):
        read_data_settings(["path=a", "max_length=0"])


@pytest.mark.parametrize("name", ["gsm8k.yaml", "llama3-8b-24gb.yaml"])
def test_examples_are_valid(name):
    from pathlib import Path

    path = Path(__file__).parents[2] / "examples" / name
    RunConfig.from_yaml(path, [] if "path" in yaml.safe_load(path.read_text()) else ["path=x"])


TOKEN = "hf_" + "A1b2C3d4E5" * 3 + "wxyz"


@pytest.mark.parametrize(
    "line",
    [
        f"path: https://ada:{TOKEN}@host/train.jsonl",
        f"run_name: {TOKEN}",
        f"train:\n  run_name: {TOKEN}",
        f"columns: {{prompt: {TOKEN}}}",
        f"target_modules: [q_proj, {TOKEN}]",
        f"token: {TOKEN}",
    ],
)
def test_secrets_are_refused_and_not_repeated(tmp_path, line):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: demo\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path)
    assert "password or an access token" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert "run.yaml, line 2" in str(caught.value) or line.startswith(
        ("columns", "target", "train")
    )
    with pytest.raises(ConfigError, match="password or an access token"):
        read_data_settings([f"path={TOKEN}"])
