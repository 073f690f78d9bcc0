"""Mixes real and made text into shards of tokens, each a pure function of seed and index.

A document is plain text between <|bos|> and <|eos|>, or a conversation in the chat template.
Whole articles of the real text are held out, and so are the shards of another seed.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scripts.make_base import prose, queries, skills
from scripts.make_base.prose import Document
from scripts.make_base.skills import Material
from tokenizers import Tokenizer

HOLD_OUT_EVERY = 20  # one article in twenty is never trained on
REAL_CHARACTERS = 2500  # length of one piece of an article
SQL = re.compile(
    r"\bselect\b[^.\n]{1,80}\bfrom\b|\b(INSERT INTO|ORDER BY|GROUP BY)\b", re.IGNORECASE
)

Maker = Callable[[random.Random], Document]

# Share of the documents (not of the tokens) that each maker writes.
SHARES: dict[str, float] = {
    "real": 0.004, "story": 0.09, "portrait": 0.07, "sums": 0.05, "purchase": 0.05, "lore": 0.05,
    "scenes": 0.04, "repeat": 0.09, "change": 0.10, "cloze": 0.07, "order": 0.04, "lookup": 0.08,
    "reshape": 0.07, "table": 0.05, "pattern": 0.07, "query": 0.13,
}  # fmt: skip


@dataclass(frozen=True)
class RealText:
    """Articles to train on, and articles held out."""

    train: list[str]
    held_out: list[str]


def _wikipedia(folder: Path) -> list[str]:
    text = (folder / "wiki_demo.txt").read_text(encoding="utf-8")
    # The dump lost the line breaks between paragraphs.
    text = re.sub(r"(?<=[a-z)][.?!])(?=[A-Z])", "\n", text)
    articles, current = [], ""
    for line in text.split("\n"):
        current += line + "\n"
        if len(current) > 20_000:
            articles.append(current)
            current = ""
    return [*articles, current]


def _web(folder: Path) -> list[str]:
    with (folder / "c4_demo.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def _wikitext(folder: Path, name: str) -> list[str]:
    """Return WikiText-2's articles without its tokenization and its sentences with <unk>."""
    articles = re.split(r"\n = (?=[^=])", (folder / name).read_text(encoding="utf-8"))
    cleaned = []
    for article in articles:
        sentences = re.split(r"(?<= [.?!]) +|\n", article)
        text = " ".join(s for s in sentences if "<unk>" not in s and len(s) > 20 and "= =" not in s)
        text = re.sub(r" @(.)@ ", r"\1", text)
        text = re.sub(r" ([.,;:?!)%]|'s\b|n't\b)", r"\1", text).replace("( ", "(")
        cleaned.append(re.sub(r'" ([^"]*?) "', r'"\1"', text))
    return cleaned


def read_real_text(folder: Path) -> RealText:
    """Read the articles under `folder`, leave out what looks like SQL, and hold some out."""
    articles = [
        *_wikipedia(folder),
        *_web(folder),
        *_wikitext(folder, "wikitext2_valid.txt"),
        *_wikitext(folder, "wikitext2_test.txt"),
    ]
    articles = [a.strip() for a in articles if len(a) > 200 and not SQL.search(a)]
    held_out = articles[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    train = [a for i, a in enumerate(articles) if i % HOLD_OUT_EVERY != HOLD_OUT_EVERY - 1]
    return RealText(train, held_out)


def material_of(real: RealText) -> Material:
    """Collect the words and the shorter sentences of the training articles."""
    counts: Counter[str] = Counter()
    sentences = []
    for article in real.train:
        counts.update(re.findall(r"[A-Za-z]{2,14}", article))
        found = re.split(r"(?<=[a-z)][.?!])\s+|\n", article)
        sentences += [s.strip() for s in found if 20 < len(s) < 160]
    return Material([word for word, n in counts.most_common(12_000) if n > 1], sentences)


def render(document: Document) -> str:
    """Return a document with its special tokens, as it is trained on."""
    if isinstance(document, str):
        return f"<|bos|>{document}<|eos|>"
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in document)
    return f"<|bos|>{turns}<|eos|>"


def makers(real: RealText, material: Material) -> dict[str, Maker]:
    """Return every maker of documents by its name in SHARES."""

    def piece(rng: random.Random) -> Document:
        article = rng.choices(real.train, cum_weights=weights)[0]
        start = rng.randrange(max(1, len(article) - REAL_CHARACTERS // 2))
        start = article.find(" ", start) + 1 if start else 0
        return article[start : start + REAL_CHARACTERS]

    weights = np.cumsum([len(article) for article in real.train]).tolist()
    made: dict[str, Maker] = {"real": piece}
    for module, names in (
        (prose, ("story", "portrait", "sums", "purchase", "lore", "scenes")),
        (queries, ("query",)),
    ):
        made |= {name: getattr(module, name) for name in names}
    for name in ("repeat", "change", "cloze", "order", "lookup", "reshape", "table", "pattern"):
        exercise = getattr(skills, name)
        made[name] = lambda rng, exercise=exercise: exercise(rng, material)
    return made


def documents(rng: random.Random, made: dict[str, Maker]) -> Iterator[str]:
    """Yield rendered documents without end, in the shares above."""
    names, shares = list(SHARES), list(SHARES.values())
    while True:
        document = made[rng.choices(names, shares)[0]](rng)
        if not isinstance(document, str) and rng.random() < 0.04:
            document = [{"role": "system", "content": "You are a helpful assistant."}, *document]
        text = render(document)
        if not SQL.search(text):
            yield text


def shard(
    tokenizer: Tokenizer, made: dict[str, Maker], *, seed: str, index: int, rows: int, length: int
) -> np.ndarray:
    """Return one shard of training text.

    Args:
        tokenizer: The trained tokenizer.
        made: The makers of documents.
        seed: Names the stream; the held-out stream has another.
        index: Which shard of the stream.
        rows: Number of rows of the shard.
        length: Tokens in a row.

    Returns:
        uint16 [rows, length]: documents one after the other, cut into rows.
    """
    stream = documents(random.Random(f"{seed}/{index}"), made)
    ids: list[int] = []
    while len(ids) < rows * length:
        batch = [next(stream) for _ in range(200)]
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids += encoding.ids
    return np.array(ids[: rows * length], dtype=np.uint16).reshape(rows, length)
