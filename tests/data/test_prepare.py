"""From files to rows that a model can learn from, as a user calls it."""

import json

import datasets
import pytest

from halfbyte.data.config import DataConfig
from halfbyte.data.loader import BatchPlan
from halfbyte.data.prepare import prepare
from halfbyte.errors import DataError


@pytest.fixture
def run(tokenizer, tmp_path):
    """Prepare rows (a list becomes a JSONL file) with the `plain` template."""

    def call(rows=None, *, seed=0, memory=None, eval_memory=None, **settings):
        if rows is not None:
            path = tmp_path / "train.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings["path"] = str(path)
        settings = {"chat_template": "plain", "cache_dir": str(tmp_path / "cache"), **settings}
        return prepare(
            DataConfig(**settings),
            settings.pop("tokenizer", tokenizer),
            seed=seed,
            rows=memory,
            eval_rows=eval_memory,
            progress=False,
        )

    return call


def sums(count, start=0):
    return [
        {"question": f"What is {n} plus two?", "answer": f"It is {n + 2}."}
        for n in range(start, start + count)
    ]


GSM8K = {"prompt": "question", "completion": "answer"}


def texts(tokenizer, dataset):
    return [tokenizer.decode(row) for row in dataset["input_ids"]]


def test_question_and_answer_train_with_two_words_of_configuration(run, tokenizer, learned):
    data = run(sums(5), columns=GSM8K)
    assert texts(tokenizer, data.train)[0] == "<s>What is 0 plus two?\nIt is 2.</s>\n"
    assert data.train.column_names == ["input_ids", "labels", "source"]
    (row,) = data.train.select([3]).to_list()
    taught = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(taught) == "It is 5.</s>"
    assert data.summary.train.rows_read == data.summary.train.rows == 5
    assert data.summary.train.supervised_tokens == sum(
        label != -100 for labels in data.train["labels"] for label in labels
    )
    assert data.summary.format == "prompt_completion"
    assert data.stop_token_ids == (tokenizer.eos_token_id,)
    assert "eos_token" in data.chat_template
    assert data.eval is None


def test_every_kind_of_source_gives_the_same_rows(run, tmp_path, tokenizer):
    rows = sums(7)
    expected = run(rows, columns=GSM8K).fingerprint
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    for name in ("a.json", "a.parquet", "a.csv"):
        assert run(path=str(tmp_path / name), columns=GSM8K).fingerprint == expected, name
    assert run(memory=rows, columns=GSM8K).fingerprint == expected
    in_memory = datasets.Dataset.from_list(rows)
    assert run(memory=in_memory, columns=GSM8K).fingerprint == expected
    part = run(path=str(tmp_path / "a.json"), split="train[:3]", columns=GSM8K)
    assert part.fingerprint == run(rows[:3], columns=GSM8K).fingerprint


def test_the_fingerprint_changes_with_what_is_seen(run):
    base = run(sums(6), columns=GSM8K)
    assert run(sums(6), columns=GSM8K, num_proc=1).fingerprint == base.fingerprint
    others = [
        run(sums(6, start=1), columns=GSM8K),
        run(sums(6), columns=GSM8K, packing=True),
        run(sums(6), columns=GSM8K, shuffle=False),
        run(sums(6), columns=GSM8K, max_length=500),
        run(sums(6), columns=GSM8K, loss_on="all"),
        run(sums(6), columns=GSM8K, eval_fraction=0.2),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_text_needs_no_template(run, tokenizer):
    data = run([{"text": "The cat sat."}], chat_template=None)
    assert texts(tokenizer, data.train) == ["<s>The cat sat.</s>"]
    assert data.chat_template is None


def test_conversations_without_a_template_say_what_to_choose(run):
    with pytest.raises(DataError, match="no chat template") as error:
        run(sums(1), columns=GSM8K, chat_template=None)
    assert "alpaca, mistral, plain, vicuna, zephyr" in error.value.hint


def test_rows_with_nothing_to_learn_are_dropped_and_counted(run):
    quiet = {"messages": [{"role": "user", "content": "hello"}]}
    loud = {"messages": [*quiet["messages"], {"role": "assistant", "content": "hi"}]}
    rows = [quiet, loud, {"messages": []}, quiet, loud]
    with pytest.raises(DataError, match="nothing_supervised: 3 of 5 rows") as error:
        run(rows)
    assert "allow: [nothing_supervised]" in error.value.hint
    data = run(rows, allow=["nothing_supervised"])
    assert len(data.train) == data.summary.train.rows == 2
    assert data.summary.train.unsupervised_rows == 3


def test_nothing_to_learn_at_all_is_an_error(run):
    quiet = {"messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(DataError, match="0 trainable tokens: none of the 2 rows"):
        run([quiet, quiet])
    with pytest.raises(DataError, match=r"0 trainable tokens: .* within max_length=4"):
        run(sums(3), columns=GSM8K, max_length=4, over_length="truncate")
    with pytest.raises(DataError, match="0 trainable tokens"):
        run(sums(3), columns=GSM8K, max_length=4, over_length="drop")


def test_long_rows_stop_the_run_unless_told_otherwise(run):
    long = {"question": "Why?", "answer": "The cat sat on the mat. " * 30}
    with pytest.raises(DataError, match=r"1 of 4 rows of .*train.jsonl are longer"):
        run([*sums(3), long], columns=GSM8K, max_length=64)
    cut = run([*sums(3), long], columns=GSM8K, max_length=64, over_length="truncate")
    assert (cut.summary.train.rows, cut.summary.train.lost_stops) == (4, 1)
    assert cut.summary.train.percentiles[100] == 64
    dropped = run([*sums(3), long], columns=GSM8K, max_length=64, over_length="drop")
    assert (dropped.summary.train.rows, dropped.summary.train.dropped_rows) == (3, 1)
    assert dropped.summary.train.unsupervised_rows == 0
    windows = run([*sums(3), long], columns=GSM8K, max_length=64, over_length="split")
    whole = run([*sums(3), long], columns=GSM8K)
    assert windows.summary.train.supervised_tokens == whole.summary.train.supervised_tokens
    assert windows.summary.train.rows > 4


def test_held_out_rows_are_disjoint_and_fixed_by_the_seed(run, tokenizer):
    rows = sums(50)
    data = run(rows, columns=GSM8K, eval_fraction=0.2, seed=1)
    train, held = (set(texts(tokenizer, part)) for part in (data.train, data.eval))
    assert (len(train), len(held)) == (40, 10)
    assert not train & held
    assert data.summary.eval.rows_read == 10
    again = run(rows, columns=GSM8K, eval_fraction=0.2, seed=1)
    assert again.fingerprint == data.fingerprint
    other = run(rows, columns=GSM8K, eval_fraction=0.2, seed=2)
    assert set(texts(tokenizer, other.eval)) != held


def test_equal_rows_are_held_out_together(run, tokenizer):
    data = run(sums(10) * 3, columns=GSM8K, eval_fraction=0.3)
    assert not set(texts(tokenizer, data.train)) & set(texts(tokenizer, data.eval))
    assert len(data.eval) % 3 == 0
    with pytest.raises(DataError, match="it has 1 different rows"):
        run(sums(1) * 5, columns=GSM8K, eval_fraction=0.5)


def test_held_out_rows_of_their_own(run, tmp_path, tokenizer):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in sums(4, start=8)))
    data = run(sums(10), columns=GSM8K, eval_path=str(held))
    assert texts(tokenizer, data.eval)[0].startswith("<s>What is 8")
    assert data.summary.eval_overlap == 2
    sliced = run(sums(10), columns=GSM8K, split="train[:8]", eval_split="train[8:]")
    assert (len(sliced.train), len(sliced.eval), sliced.summary.eval_overlap) == (8, 2, 0)
    memory = run(memory=sums(3), eval_memory=sums(2, start=5), columns=GSM8K)
    assert (len(memory.train), len(memory.eval)) == (3, 2)


def test_system_prompt_reaches_every_row(run, tokenizer):
    data = run(sums(2), columns=GSM8K, system_prompt="Be brief.")
    assert all(text.startswith("<s>Be brief.\nWhat") for text in texts(tokenizer, data.train))


def test_bad_rows_name_their_line(run):
    rows = [*sums(3), {"question": "x"}, *sums(2)]
    with pytest.raises(DataError, match=r"train.jsonl line 4: the column 'answer' is missing"):
        run(rows, columns=GSM8K)


def test_no_path_and_missing_files(run):
    with pytest.raises(DataError, match="`path` is not set"):
        run()
    with pytest.raises(DataError, match="there is no file or folder"):
        run(path="./gone.jsonl")


def test_a_conversation_that_the_template_rewrites_stays_on_one_side(run, make_tokenizer):
    # The stop token is on the last turn only: two turns become two rows.
    template = (
        "{% for m in messages %}{{ m.content }}{% if loop.last and m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    rows = [
        {
            "messages": [
                {"role": role, "content": f"{role} {n} {turn}"}
                for turn in (1, 2)
                for role in ("user", "assistant")
            ]
        }
        for n in range(10)
    ]
    data = run(rows, chat_template=template, eval_fraction=0.3)
    assert (len(data.train), len(data.eval)) == (14, 6)
    assert data.summary.train.rewritten == 14
    assert data.summary.train.rows_read == 7


def test_prepared_rows_make_batches(run):
    data = run(sums(30), columns=GSM8K, packing=True, max_length=128)
    plan = BatchPlan(
        data.train,
        batch_size=2,
        gradient_accumulation_steps=1,
        packing=True,
        max_length=128,
        seed=0,
        pad_token_id=None,
    )
    batches = [batch for index in range(len(plan)) for batch in plan.step(0, index)]
    assert sum(batch.num_tokens for batch in batches) == data.summary.train.total_tokens
    assert sum(batch.num_supervised for batch in batches) == data.summary.train.supervised_tokens


def test_nothing_is_printed_without_a_terminal(run, capfd):
    run(sums(5), columns=GSM8K)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_learned_tokens_are_counted_by_file_where_there_are_several(run, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for name, rows in (("large.jsonl", sums(8)), ("small.json", sums(2, start=50))):
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
        (folder / name).write_text(text)
    train = run(path=str(folder), columns=GSM8K).summary.train
    assert train.sources.keys() == {"large.jsonl", "small.json"}
    assert sum(train.sources.values()) == train.supervised_tokens
    assert train.sources["large.jsonl"] > 3 * train.sources["small.json"]
    assert run(sums(3), columns=GSM8K).summary.train.sources == {}
    assert run(memory=sums(3), columns=GSM8K).summary.train.sources == {}


def test_broken_rows_stop_the_run_or_are_left_out(run, tmp_path):
    path = tmp_path / "broken.jsonl"
    lines = [json.dumps(row) for row in sums(20)]
    path.write_text("\n".join([*lines, '{"question": "x"}', "{broken", '{"question": 5}']))
    with pytest.raises(DataError, match=r"line 22: broken JSON .* \(and 2 more rows") as error:
        run(path=str(path), columns=GSM8K)
    assert "allow: [unreadable_rows]" in error.value.hint
    data = run(path=str(path), columns=GSM8K, allow=["unreadable_rows"])
    assert (len(data.train), data.summary.train.unreadable_rows) == (20, 3)
    assert data.summary.train.unsupervised_rows == 0
    (finding,) = data.summary.findings
    assert (finding.name, finding.allowed) == ("unreadable_rows", True)


def test_findings_are_in_the_summary(run):
    data = run(sums(20) * 2, columns=GSM8K)
    assert [finding.name for finding in data.summary.findings] == ["duplicates"]
    assert data.summary.findings[0].count == 20
