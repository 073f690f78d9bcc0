"""halfbyte merge: from a run's folder to a checkpoint that is a model of its own."""

import json

import pytest
from transformers import AutoModelForCausalLM


@pytest.fixture
def held_out(tmp_path):
    """Rows that no run has seen."""
    path = tmp_path / "held_out.jsonl"
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(20, 24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report(folder):
    return json.loads((folder / "merge_report.json").read_text())


def test_a_run_becomes_a_model_measured_on_its_own_rows(run, trained, tmp_path):
    result = run("merge", trained, "merged")
    assert result.exit_code == 0, result.output
    found = report(tmp_path / "merged")
    assert found["measured"]["rows"] == 16
    for sentence in found["in_words"]:
        assert sentence in result.stdout
    assert "KL" in result.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("onto", ["dequantized", "original", "quantized"])
def test_onto_what_may_be_said(run, trained, tmp_path, onto):
    result = run("merge", trained, "merged", "--onto", onto, "--data", "none", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "as asked for" in result.stdout
    assert ("Warning" in result.stdout) == (onto == "quantized")
    assert report(tmp_path / "merged")["onto"] == onto
    assert report(tmp_path / "merged")["measured"] is None


def test_other_rows_are_read_as_the_run_read_its_own(run, trained, tmp_path, held_out):
    result = run("merge", trained, "merged", "--data", held_out)
    assert result.exit_code == 0, result.output
    assert report(tmp_path / "merged")["measured"]["rows"] == 4


def test_the_runs_rows_may_be_gone(run, trained, tmp_path, data):
    data.unlink()
    result = run("merge", trained, "merged")
    assert result.exit_code == 0, result.output
    assert "not measured, the run's own rows cannot be read" in result.stdout
    assert report(tmp_path / "merged")["onto"] == "dequantized"


def test_wrong_arguments_leave_nothing(run, trained, tmp_path):
    for arguments, message in (
        (["--onto", "both"], "onto should be"),
        (["--base", "./nowhere"], "nowhere"),
        (["--dtype", "int4"], "dtype should be"),
        (["--max-shard-size", "big"], "expected a size"),
        (["--device", "abacus"], "expected a device"),
        (["--data", "./nothing.jsonl"], "nothing.jsonl"),
    ):
        result = run("merge", trained, "merged", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "merged").exists()
        assert not list(tmp_path.glob(".merged*"))


def test_a_folder_without_adapter_is_an_error(run, tmp_path):
    result = run("merge", tmp_path, "merged")
    assert result.exit_code == 2
    assert "adapter_config.json" in result.stderr


def test_what_is_there_is_kept_unless_told(run, trained, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    assert run("merge", trained, "merged").exit_code == 2
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"
    result = run("merge", trained, "merged", "--overwrite", "--data", "none")
    assert result.exit_code == 0, result.output


def test_what_servers_cannot_take_is_said_after_training_and_merging(run, config):
    result = run("train", config, "use_dora=true")
    assert result.exit_code == 0, result.output
    assert "note: vLLM refuses DoRA's magnitudes: merge it" in result.stdout
    result = run("merge", "out", "merged", "--data", "none")
    assert "note: unmerged, llama.cpp has no place for DoRA" in result.stdout
