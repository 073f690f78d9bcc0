"""The task: the same rows everywhere, and nothing of the held-out ones among the others."""

import json
import sqlite3

import pytest

from halfbyte.demo.tables import TABLES
from halfbyte.demo.task import HELD_OUT_ROWS, TRAIN_ROWS, make_task, write_task


@pytest.fixture(scope="module")
def task():
    return make_task()


def test_there_are_enough_rows_and_none_twice(task):
    assert len(task.train) == TRAIN_ROWS >= 1500
    assert len(task.held_out) == HELD_OUT_ROWS == 200
    prompts = [question.prompt for question in task.train + task.held_out]
    assert len(set(prompts)) == len(prompts)


def test_no_question_answer_or_value_is_in_both(task):
    train_answers = {question.completion for question in task.train}
    train_values = {value for question in task.train for value in question.values}
    for question in task.held_out:
        assert question.completion not in train_answers
        assert not train_values & set(question.values)


def test_a_third_of_the_held_out_combinations_is_unseen(task):
    seen = {question.combination for question in task.train}
    unseen = [q for q in task.held_out if q.combination not in seen]
    assert len(unseen) >= len(task.held_out) / 3
    assert len(unseen) < len(task.held_out)


def test_rows_are_the_same_in_every_process(task):
    assert make_task() == task
    # Fixed here, so that no other Python or platform draws other rows unnoticed.
    assert task.train[0].row == {
        "prompt": "Number of flights cheaper than 960",
        "completion": "select count(*) from flights where fare < 960",
    }


def test_another_seed_gives_other_rows(task):
    assert make_task(seed=1).train != task.train


def test_every_answer_is_sql_that_runs(task):
    database = sqlite3.connect(":memory:")
    for table in TABLES:
        columns = [table.key, *(column.name for column in table.columns)]
        database.execute(f"create table {table.name} ({', '.join(columns)})")
    for question in task.train + task.held_out:
        database.execute(question.completion)
    database.close()


def test_every_value_is_in_question_and_answer(task):
    for question in task.train + task.held_out:
        for value in question.values:
            assert value in question.prompt
            assert value in question.completion


def test_files_hold_the_rows(task, tmp_path):
    for path, questions in zip(
        write_task(tmp_path, task), (task.train, task.held_out), strict=True
    ):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [q.row for q in questions]
