import json

import numpy as np
from rich.console import Console

from halfbyte.data.findings import Finding, Level
from halfbyte.data.summary import SplitSummary, Summary, length_percentiles


def split(**counts):
    zeros = {
        name: 0
        for name, field in SplitSummary.__dataclass_fields__.items()
        if field.type == "int" or field.type is int
    }
    return SplitSummary(**{**zeros, **counts}, percentiles=length_percentiles(np.arange(1, 101)))


def summary(**changes):
    settings = {
        "train": split(rows_read=12345, rows=100, lost_stops=7),
        "eval": None,
        "eval_overlap": 0,
        "format": "messages",
        "stop": "[/INST]",
        "seconds": 1.25,
        "from_cache": True,
    }
    return Summary(**{**settings, **changes})


def printed(value):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(value)
    return capture.get()


def test_percentiles_are_lengths_that_occur():
    assert length_percentiles(np.array([1, 2, 1000])) == {
        50: 2,
        90: 1000,
        95: 1000,
        99: 1000,
        100: 1000,
    }
    assert set(length_percentiles(np.array([], dtype=np.int64)).values()) == {0}


def test_the_table_shows_what_happened_and_not_what_did_not():
    text = printed(summary())
    assert "12,345" in text
    assert "rows that lost their stop token" in text
    assert "[/INST]" in text
    assert "from cache" in text
    assert "nothing to learn" not in text
    assert "eval" not in text


def test_held_out_rows_have_a_column_and_overlap_is_told():
    text = printed(summary(eval=split(rows_read=5, unsupervised_rows=2), eval_overlap=3))
    assert "eval" in text
    assert "dropped: nothing to learn" in text
    assert "held-out rows that are also trained on" in text


def test_it_goes_into_json():
    assert json.loads(json.dumps(summary().as_dict()))["train"]["rows_read"] == 12345


def test_findings_are_printed_and_kept():
    finding = Finding("pad_is_eos", Level.INFO, "", 0, "padding is [/INST]")
    found = summary(findings=(finding,))
    assert "pad_is_eos: padding is [/INST]" in printed(found)
    kept = json.loads(json.dumps(found.as_dict()))["findings"]
    assert [(each["name"], each["level"]) for each in kept] == [("pad_is_eos", "info")]
