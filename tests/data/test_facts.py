import numpy as np
import pytest

from halfbyte.data.chat import ChatEncoder
from halfbyte.data.facts import origin_of
from halfbyte.data.formats import detect
from halfbyte.data.notes import Note
from halfbyte.data.sources import from_rows
from halfbyte.data.templates import NAMED
from halfbyte.data.tokenize import tokenize


@pytest.fixture
def read(tokenizer, tmp_path):
    """Return the facts of four rows, the third one broken."""
    rows = [
        {"prompt": "a\x00", "completion": "b", "source": "one"},
        {"prompt": "c", "completion": "d"},
        {"prompt": "e", "completion": 5, "source": "two"},
        {"prompt": "a\x00", "completion": "b"},
    ]
    source = from_rows(rows)
    layout = detect("auto", {}, source.first(), None)
    encoder = ChatEncoder(tokenizer, NAMED["plain"].jinja, loss_on="assistant")
    _, facts, _ = tokenize(source, layout, encoder, cache_dir=str(tmp_path), progress=False)
    return source, facts


def test_facts_of_every_row_are_kept_with_its_tokens(read):
    source, facts = read
    assert facts.source.tolist() == [0, 1, 2, 3]
    assert facts.notes.tolist() == [Note.CONTROL, 0, 0, Note.CONTROL]
    assert facts.origins.tolist() == ["one", None, "two", None]
    assert (facts.signatures[0] == facts.signatures[3]).all()
    (broken,) = facts.broken(source)
    assert broken.where == "row 3"
    assert "completion must be text" in broken.message
    assert broken.hint


def test_a_part_of_them(read):
    _, facts = read
    part = facts.select(np.array([False, True, True, False]))
    assert part.source.tolist() == [1, 2]
    assert list(part.errors) == [2]
    assert facts.select(np.array([True, False, False, False])).errors == {}


def test_where_a_row_says_that_it_is_from():
    assert origin_of({"dataset": "alpaca", "subset": "x"}) == "alpaca"
    assert origin_of({"source": 5, "origin": "web"}) == "web"
    assert origin_of({"text": "x"}) is None
    assert len(origin_of({"source": "x" * 500})) == 80
