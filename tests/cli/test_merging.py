"""The rows that merge and export measure on: named ones, the run's own, or none."""

import pytest

from halfbyte.cli.merging import base_settings, measured, rows_of
from halfbyte.errors import ConfigError, DataError


def test_rows_are_those_named_or_the_runs_own(trained, data, tmp_path):
    own = rows_of(trained, None)
    assert own["data"].path == str(data)
    assert own["seed"] == 42
    other = tmp_path / "other.jsonl"
    named = rows_of(trained, str(other))
    assert named["data"].path == str(other)
    assert named["data"].columns == own["data"].columns
    assert rows_of(tmp_path / "nowhere", None) == {}


def test_rows_of_the_run_may_be_gone_and_named_ones_not(capsys):
    def merge(rows):
        if rows:
            raise DataError("gone")
        return "merged"

    assert measured(merge, {"data": 1}, None) == "merged"
    assert "not measured, the run's own rows cannot be read: gone" in capsys.readouterr().out
    with pytest.raises(DataError):
        measured(merge, {"data": 1}, "named.jsonl")


def test_an_error_that_has_nothing_to_do_with_rows_stays_one():
    def merge(rows):
        raise DataError("refused")

    with pytest.raises(DataError, match="refused"):
        measured(merge, {}, None)


def test_a_base_and_its_bits_are_settings_of_the_merge(tmp_path):
    assert base_settings(None, None) == {"base": None, "quant": None}
    assert base_settings(None, "fp4")["quant"].quant_type == "fp4"
    with pytest.raises(ConfigError):
        base_settings(None, "int4")
