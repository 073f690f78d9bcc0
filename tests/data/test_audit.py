"""The report as a user reads it: counts, histogram, findings; and training finds the tokens."""

import itertools
import json

import numpy as np
import pytest
from rich.console import Console

from halfbyte.data.audit import audit, histogram, verdict
from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import prepare

ROWS = [
    {
        "prompt": f"What is {n} plus {n * 31}? " + "Think. " * (n % 9),
        "completion": f"It is {n * 32}.",
    }
    for n in range(60)
]


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"path": str(path), "chat_template": "plain", "cache_dir": str(tmp_path / "cache")}


def test_counts_are_those_that_training_has(settings, tokenizer):
    config = DataConfig(**settings, eval_fraction=0.2)
    report, gathered = audit(config, tokenizer, seed=3, progress=False)
    prepared = prepare(config, tokenizer, seed=3, progress=False)
    assert prepared.summary.from_cache
    assert not report.from_cache
    for name, counts in (("train", prepared.summary.train), ("eval", prepared.summary.eval)):
        split = report.splits[name]
        assert split.rows == counts.rows == len(gathered.splits[name].rows)
        assert split.total_tokens == counts.total_tokens
        assert split.supervised_tokens == counts.supervised_tokens
        assert split.median == counts.percentiles[50]
        assert (split.p95, split.max) == (counts.percentiles[95], counts.percentiles[100])
        assert sum(bar.rows for bar in split.histogram) == split.rows
    assert report.stop == "</s>"
    assert not report.ruins


def test_the_report_is_text_and_json(settings, tokenizer):
    report, _ = audit(DataConfig(**settings, max_length=40), tokenizer, progress=False)
    assert report.ruins
    assert verdict(report) == "1 finding would ruin the model: train refuses them"
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report)
    text = capture.get()
    for said in ("learned tokens", "median length", "█", "over_length", "raise max_length"):
        assert said in text
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["ruins"]
    assert plain["findings"][0]["name"] == "over_length"
    assert plain["findings"][0]["level"] == "ruins"
    assert plain["splits"]["train"]["histogram"][0]["rows"] > 0


def test_bars_hold_every_row():
    lengths = np.array([5, 5, 6, 100, 1000])
    bars = histogram(lengths)
    assert sum(bar.rows for bar in bars) == 5
    assert len(bars) <= 12
    assert bars[0].first == 5
    assert bars[-1].last >= 1000
    assert all(a.last + 1 == b.first for a, b in itertools.pairwise(bars))
    assert [bar.rows for bar in histogram(np.array([7, 7]))] == [2]
    assert histogram(np.array([], dtype=np.int64)) == ()


def test_rows_without_any_tokens_are_reported_too(settings, tokenizer):
    quiet = [{"messages": [{"role": "user", "content": "hello"}]}] * 3
    settings = {**settings, "path": None}
    report, _ = audit(DataConfig(**settings), tokenizer, rows=quiet, progress=False)
    assert report.splits["train"].rows == 0
    assert {"nothing_supervised", "roles_out_of_order"} <= {f.name for f in report.findings}
    assert report.ruins
