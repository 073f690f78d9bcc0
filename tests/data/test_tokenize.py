import os
import re
import signal

import datasets
import pytest

from halfbyte.data import tokenize as module
from halfbyte.data import words
from halfbyte.data.chat import ChatEncoder
from halfbyte.data.formats import detect
from halfbyte.data.sources import from_rows
from halfbyte.data.templates import NAMED
from halfbyte.data.tokenize import cache_key, progress_bars, tokenize
from halfbyte.errors import DataError

ROWS = [{"prompt": f"What is {n} plus two?", "completion": f"{n + 2}"} for n in range(40)]


@pytest.fixture
def run(tokenizer, tmp_path):
    def call(rows=ROWS, template="plain", loss_on="assistant", num_proc=None, with_facts=False):
        source = from_rows(rows)
        layout = detect("auto", {}, source.first(), None)
        encoder = ChatEncoder(tokenizer, NAMED[template].jinja, loss_on=loss_on)
        rows, facts, was_cached = tokenize(
            source,
            layout,
            encoder,
            num_proc=num_proc,
            cache_dir=str(tmp_path / "cache"),
            progress=False,
        )
        return (rows, facts) if with_facts else (rows, was_cached)

    return call


def test_tokens_come_from_the_cache_only_if_nothing_changed(run):
    first, was_cached = run()
    assert not was_cached
    again, was_cached = run()
    assert was_cached
    assert again.digest() == first.digest()
    for change in (
        {"rows": ROWS[1:]},
        {"template": "alpaca"},
        {"loss_on": "all"},
        {"rows": [*ROWS, {"prompt": "x", "completion": "y"}]},
    ):
        assert not run(**change)[1]


def test_the_tokenizer_is_part_of_the_key(make_tokenizer):
    source = from_rows(ROWS)
    layout = detect("auto", {}, source.first(), None)
    keys = {
        cache_key(source, layout, ChatEncoder(tokenizer, "{{ 1 }}", loss_on="all"))
        for tokenizer in (make_tokenizer(), make_tokenizer(special=("<x>",)))
    }
    assert len(keys) == 2


def test_processes_change_nothing(run):
    alone, _ = run(loss_on="assistant")
    assert not run(loss_on="all")[1]
    together, was_cached = run(rows=list(ROWS), num_proc=2)
    assert was_cached  # how many wrote the tokens does not matter
    assert together.digest() == alone.digest()


def test_two_processes_give_the_same_tokens(run, tmp_path):
    together, _ = run(num_proc=2)
    for file in (tmp_path / "cache").rglob("*.arrow"):
        file.unlink()
    alone, was_cached = run()
    assert not was_cached
    assert together.digest() == alone.digest()
    assert together.source.tolist() == list(range(40))


def test_rows_are_tokenized_whole_where_words_differ(run, tmp_path, monkeypatch, caplog):
    right, _ = run()
    for file in (tmp_path / "cache").rglob("*.arrow"):
        file.unlink()
    monkeypatch.setattr(words, "word_pattern", lambda _: re.compile(r"\s|\S"))
    assert run(num_proc=2)[0].digest() == right.digest()
    assert "all rows again" in caplog.text


def test_broken_rows_are_facts_and_name_themselves(run):
    rows = [*ROWS, {"prompt": "x", "completion": 5}]
    for num_proc in (None, 2):
        tokens, facts = run(rows=rows, num_proc=num_proc, with_facts=True)
        ((number, (message, hint)),) = facts.errors.items()
        assert number == 40
        assert message.startswith("row 41: completion must be text")
        assert "columns" in hint
        assert tokens.source.tolist() == list(range(40))
        assert len(facts) == 41


def test_a_cache_that_cannot_be_used_is_an_error(run, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"token cache .* cannot be used") as error:
        run()
    assert "cache_dir" in error.value.hint


def test_a_damaged_cache_is_an_error(run, tmp_path):
    run()
    (file,) = (tmp_path / "cache").rglob("*.arrow")
    file.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"token cache .* cannot be used"):
        run()


def test_few_rows_are_not_worth_a_process(monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert module._processes(4_000) is None
    assert module._processes(5_000) == 2
    assert module._processes(1_000_000) == 8


def test_bars_are_as_before_afterwards():
    before = datasets.are_progress_bars_disabled()
    with progress_bars(shown=False):
        assert datasets.are_progress_bars_disabled()
        with progress_bars(shown=True):
            assert not datasets.are_progress_bars_disabled()
    assert datasets.are_progress_bars_disabled() == before


def test_a_process_that_dies_is_an_error_and_not_a_hang(run, monkeypatch):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(module, "tokenize_batch", die)
    with pytest.raises(DataError, match=r"process that tokenized .* was killed") as caught:
        run(num_proc=2)
    assert "num_proc: 1" in caught.value.hint
