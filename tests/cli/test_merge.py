"""halfbyte merge: from a run's folder to a checkpoint that is a model of its own."""

import pytest
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_a_run_becomes_a_model(run, trained, tmp_path, onto):
    result = run("merge", trained, "merged", "--onto", onto)
    assert result.exit_code == 0, result.output
    assert f"({onto})" in result.stdout
    assert "lost to rounding" in result.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--onto", "both"], "onto should be"),
        (["--base", "./nowhere"], "nowhere"),
        (["--dtype", "int4"], "dtype should be"),
        (["--max-shard-size", "big"], "expected a size"),
    ],
)
def test_wrong_arguments_leave_nothing(run, trained, tmp_path, arguments, message):
    result = run("merge", trained, "merged", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "merged").exists()


def test_a_folder_without_adapter_is_an_error(run, tmp_path):
    result = run("merge", tmp_path, "merged")
    assert result.exit_code == 2
    assert "adapter_config.json" in result.stderr


def test_what_is_there_is_kept_unless_told(run, trained, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    assert run("merge", trained, "merged").exit_code == 2
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"
    assert run("merge", trained, "merged", "--overwrite").exit_code == 0
