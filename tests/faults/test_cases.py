"""Every one of the 102 cases has a test that exists, or a reason for having none."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("README.md")
ROW = re.compile(r"\| (\d+) \| (.+?) \| (.+?) \|")
TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")
ROWS = {int(n): (what, shown) for n, what, shown in ROW.findall(TABLE.read_text(encoding="utf-8"))}


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_case_stands_in_the_table_once():
    assert list(ROWS) == list(range(1, 103))


@pytest.mark.parametrize("number", ROWS)
def test_each_case_has_a_test_or_a_reason(number):
    _, shown = ROWS[number]
    tests = TEST.findall(shown)
    assert tests or re.match(r"none: \w+", shown)
    for path, name in tests:
        assert name in functions(ROOT / path), f"{path} has no {name}"


def test_tests_that_are_named_after_a_case_stand_in_its_row():
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name in functions(path):
            if match := re.match(r"test_case_(\d+)_", name):
                assert name in ROWS[int(match[1])][1]
