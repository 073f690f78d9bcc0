import dataclasses

import pytest
from rich.console import Console

from halfbyte.data.findings import Finding, Level, by_level, refuse, ruinous
from halfbyte.errors import DataError

RUINS = Finding("no_stop", Level.RUINS, "train", 3, "3 of 4 rows never stop", "set eos", ("row 1",))
WARNING = Finding("duplicates", Level.WARNING, "train", 1, "1 of 4 rows repeats", "keep one")
INFO = Finding("pad_is_eos", Level.INFO, "", 0, "padding is [/INST]", "not shown")


def test_the_worst_comes_first():
    assert by_level([INFO, WARNING, RUINS]) == [RUINS, WARNING, INFO]
    assert ruinous([INFO, WARNING]) == []


def test_what_ruins_is_refused_with_reason_row_and_setting():
    refuse([WARNING, INFO])
    with pytest.raises(DataError, match="no_stop: 3 of 4 rows never stop; row 1") as error:
        refuse([WARNING, RUINS])
    assert error.value.hint == "set eos"
    with pytest.raises(DataError, match=r"\(and 1 more such findings\)"):
        refuse([RUINS, RUINS])


def printed(value):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(value)
    return capture.get()


def test_it_is_printed_as_text_whatever_it_spells():
    text = printed(RUINS)
    assert "ruins  no_stop: 3 of 4 rows never stop" in text
    assert "· row 1" in text
    assert "set eos" in text
    assert "[/INST]" in printed(INFO)
    assert "not shown" not in printed(INFO)
    assert "allowed" in printed(dataclasses.replace(RUINS, level=Level.WARNING, allowed=True))
