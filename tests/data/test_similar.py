"""MinHash against the sets that it estimates."""

import random
import tracemalloc

import numpy as np
import pytest

from halfbyte.data.similar import earlier_twins, likeness, signatures, twins_among

WORDS = [f"word{i}" for i in range(500)]


def text(seed, length=60):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def shingles(text):
    data = " ".join(text.lower().split()).encode()
    return {data[i : i + 8] for i in range(len(data) - 7)}


def jaccard(first, second):
    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def changed(original, count, seed):
    words = original.split()
    source = random.Random(seed)
    for place in source.sample(range(len(words)), count):
        words[place] = source.choice(WORDS)
    return " ".join(words)


def test_likeness_estimates_the_share_of_common_shingles():
    errors = []
    for seed in range(60):
        first = text(seed, length=20 + seed)
        second = changed(first, seed % 12, seed)
        a, b = signatures([first, second])
        errors.append(likeness(a, b) - jaccard(first, second))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.07


def test_case_and_spaces_do_not_matter_and_order_in_a_batch_neither():
    a, b = signatures(["The cat  sat on\nthe mat", "the cat sat on the MAT "])
    assert (a == b).all()
    texts = [text(seed) for seed in range(5)] + ["", "ab", "\ud800"]
    together = signatures(texts)
    alone = np.concatenate([signatures([each]) for each in texts])
    assert (together == alone).all()


@pytest.fixture(scope="module")
def crowd():
    """200 unrelated texts, then 50 of them with one word changed."""
    texts = [text(seed) for seed in range(200)]
    return texts, [changed(texts[i], 1, i) for i in range(50)]


def test_earlier_twins_are_found_and_strangers_are_not(crowd):
    originals, copies = crowd
    twins = earlier_twins(signatures(originals + copies))
    assert (twins[:200] == -1).all()
    expected = np.arange(50)
    alike = np.array([jaccard(originals[i], copies[i]) > 0.88 for i in range(50)])
    assert alike.sum() > 40
    assert (twins[200:][alike] == expected[alike]).mean() > 0.95
    assert set(twins[200:]) <= {-1, *range(50)}


def test_twins_among_others(crowd):
    originals, copies = crowd
    twins = twins_among(signatures(copies), signatures(originals))
    assert (twins == np.arange(50)).mean() > 0.9
    assert (twins_among(signatures(originals[100:]), signatures(originals[:50])) == -1).all()


def test_equal_rows_and_no_rows():
    same = signatures(["exactly the same text"] * 4)
    assert earlier_twins(same).tolist() == [-1, 0, 1, 2]
    none = signatures([])
    assert none.shape == (0, 64)
    assert earlier_twins(none).tolist() == []
    assert twins_among(none, same).tolist() == []
    assert twins_among(same, none).tolist() == [-1] * 4


def test_long_texts_take_little_memory_and_their_beginning_counts():
    book = text(1, length=20_000)
    tracemalloc.start()
    together = signatures([book * 20] * 8 + ["short text of its own"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 << 20
    assert (together[0] == signatures([book])[0]).all()
    assert (together[8] == signatures(["short text of its own"])[0]).all()
