import pytest

from halfbyte.data.config import DataConfig
from halfbyte.data.findings import Level
from halfbyte.data.gather import gather
from halfbyte.data.overlap import duplicates, overlaps, row_keys

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
]


def row(n, tail=""):
    words = [WORDS[(n * 7 + i * i * (n + 3)) % len(WORDS)] + str(n * i) for i in range(40)]
    return {"prompt": f"question {n}: " + " ".join(words), "completion": f"answer {n}{tail}"}


@pytest.fixture
def gathered(tokenizer, tmp_path):
    def call(rows, eval_rows=None):
        config = DataConfig(chat_template="plain", cache_dir=str(tmp_path))
        return gather(config, tokenizer, seed=0, rows=rows, eval_rows=eval_rows, progress=False)

    return call


def at(number):
    return f"row {number + 1}: text"


def test_repeated_and_nearly_repeated_rows(gathered):
    data = gathered([*map(row, range(30)), row(3), row(3), row(4, " and more")]).train
    exact, near = duplicates("train", data, at)
    assert (exact.name, exact.count, exact.level) == ("duplicates", 2, Level.WARNING)
    assert exact.examples[0] == "row 31: text (like row 4)"
    assert (near.name, near.count, near.level) == ("near_duplicates", 1, Level.INFO)
    assert near.examples == ("row 33: text (like row 5)",)
    assert list(duplicates("train", gathered([*map(row, range(30))]).train, at)) == []


def test_one_long_prompt_does_not_make_rows_alike(gathered):
    prompt = {"role": "system", "content": "You are a helpful assistant of great patience. " * 40}
    rows = [
        {
            "messages": [
                prompt,
                {"role": "user", "content": row(n)["prompt"]},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for n in range(20)
    ]
    assert list(duplicates("train", gathered(rows).train, at)) == []


def test_held_out_rows_that_are_trained_on(gathered):
    held = [row(100), row(2), row(5, " it is"), row(101)]
    both = gathered([*map(row, range(30))], held)
    exact, near = overlaps(both.train, both.eval, at)
    assert (exact.name, exact.count) == ("eval_overlap", 1)
    assert exact.examples == ("row 2: text (like row 3)",)
    assert (near.name, near.count) == ("eval_near_overlap", 1)
    assert near.examples == ("row 3: text (like row 6)",)
    assert "1 of 4 held-out rows" in near.text


def test_rows_of_one_conversation_have_one_key(gathered):
    turns = [
        {"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")
    ]
    data = gathered([{"messages": turns}, {"messages": turns[:2]}]).train
    numbers, keys = row_keys(data)
    assert numbers.tolist() == [0, 1]
    assert len(set(keys)) == 2
