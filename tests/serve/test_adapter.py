"""What is served is freed once: after it was retired and the last holder let go."""

from pathlib import Path

import pytest

from halfbyte.serve.adapter import ServedModel


@pytest.fixture
def freed():
    return []


@pytest.fixture
def model(tiny_base, freed):
    return ServedModel("red", Path(), None, frozenset(), on_free=lambda: freed.append("red"))


def test_it_is_freed_after_the_last_holder(model, freed):
    model.hold()
    model.hold()
    model.retire()
    model.let_go()
    assert freed == []
    model.let_go()
    assert freed == ["red"]


def test_it_is_freed_at_once_when_nobody_holds_it(model, freed):
    model.hold()
    model.let_go()
    assert freed == []
    model.retire()
    assert freed == ["red"]
