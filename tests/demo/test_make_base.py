"""The scripts that make the base: their text is reproducible, and the demo's task is not in it."""

import importlib
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.demo.base import base_path
from halfbyte.demo.tables import TABLES
from halfbyte.demo.task import make_task

ROOT = Path(__file__).parents[2]
PROSE = (
    "The old baker walked to the harbour. She found a small boat there. It was quiet, and cold. "
)


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("scripts.make_base.corpus")


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    articles = "\n".join(f"\n = Title {i} = \n\n {PROSE * 5}" for i in range(8))
    (folder / "wiki_demo.txt").write_text(PROSE * 300)
    (folder / "wikitext2_valid.txt").write_text(articles)
    (folder / "wikitext2_test.txt").write_text(articles)
    pages = [PROSE * 4] * 30 + ["To see all, select name from the list. " * 10]
    (folder / "c4_demo.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in pages))
    return folder


@pytest.fixture
def made(corpus, text_folder):
    real = corpus.read_real_text(text_folder)
    return corpus.makers(real, corpus.material_of(real))


def test_held_out_articles_are_whole_and_what_looks_like_sql_is_dropped(corpus, text_folder):
    real = corpus.read_real_text(text_folder)
    total = len(real.train) + len(real.held_out)
    assert len(real.held_out) == total // corpus.HOLD_OUT_EVERY > 0
    assert not any("select name from" in article for article in real.train + real.held_out)


def test_a_shard_is_a_function_of_seed_and_index(corpus, made):
    backend = AutoTokenizer.from_pretrained(base_path()).backend_tokenizer

    def make(index):
        return corpus.shard(backend, made, seed="s", index=index, rows=4, length=256)

    assert make(0).shape == (4, 256)
    assert make(0).dtype == np.uint16
    assert np.array_equal(make(0), make(0))
    assert not np.array_equal(make(0), make(1))


def test_conversations_are_written_as_the_chat_template_writes_them(corpus):
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    messages = [{"role": "user", "content": "Repeat: a"}, {"role": "assistant", "content": "a"}]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    assert corpus.render(messages) == written + tokenizer.eos_token


def test_every_maker_writes_something_and_nothing_of_the_task(corpus, made):
    assert set(made) == set(corpus.SHARES)
    for maker in made.values():
        assert corpus.render(maker(random.Random(1))) == corpus.render(maker(random.Random(1)))
    text = "\n".join(itertools.islice(corpus.documents(random.Random(0), made), 3000))
    assert not corpus.SQL.search(text)
    task = make_task()
    assert not any(q.completion in text for q in task.train + task.held_out)
    assert not any(f"from {table.name}" in text for table in TABLES)


@pytest.mark.slow
def test_the_scripts_make_a_model_that_loads(text_folder, tmp_path):
    out = tmp_path / "out"
    for module, *extra in (
        ("tokenizer",),
        ("train", "--tokens", "20000", "--rows", "2", "--workers", "1"),
    ):
        subprocess.run(
            [sys.executable, "-m", f"scripts.make_base.{module}", text_folder, out, *extra],
            cwd=ROOT,
            check=True,
        )
    report = json.loads((out / "training.json").read_text())
    assert report["tokens"] >= 16_000
    assert 0 < report["bits_per_byte_real"] < 20
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(out))
