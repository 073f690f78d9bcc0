"""halfbyte evaluate: loss, perplexity and right answers, read as the training read its rows."""

import json

COLUMNS = "columns={prompt: question, completion: answer}"


def loss(result):
    assert result.exit_code == 0, result.output
    return float(result.stdout.split("loss")[1].split()[0])


def test_base_and_adapter_differ_and_the_runs_columns_are_known(run, tiny_base, trained, data):
    base = loss(run("evaluate", tiny_base, data, COLUMNS))
    adapted = loss(run("evaluate", trained, data))
    assert adapted < base
    assert loss(run("evaluate", tiny_base, data, "--adapter", trained)) == adapted


def test_answers_are_scored_and_written(run, trained, data, tmp_path):
    result = run(
        "evaluate", trained, data, "--exact-match", "number", "--limit", "3", "--out", "all.json"
    )
    assert result.exit_code == 0, result.output
    assert "of 3" in result.stdout
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["total"] == len(written["samples"]) == 3
    assert written["loss"] > 0


def test_wrong_arguments_are_said(run, tiny_base, data):
    for arguments, message in (
        (["missing.jsonl"], "missing.jsonl"),
        ([data], "columns"),
        ([data, COLUMNS, "learning_rate=1"], "says nothing about the data"),
        ([data, COLUMNS, "--exact-match", "fuzzy"], "--exact-match should be"),
        ([data, COLUMNS, "--quant", "int4"], "--quant should be"),
    ):
        result = run("evaluate", tiny_base, *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
