"""The rules of the house, as tests: who may import whom, how long, what stands beside what."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import halfbyte

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "halfbyte"
LADDER = [  # a part may import from lower rungs and from itself, never sideways or up
    {"errors"},
    {"device"},
    {"kernels", "checkpoint"},
    {"quant", "data", "memory"},
    {"models", "optim"},
    {"adapters"},
    {"engine"},
    {"plan"},
    {"train"},
    {"export", "generate"},
    {"gguf"},
    {"demo", "serve"},
    {"config"},
    {"cli"},
    {"__main__"},
]
RUNG = {part: rung for rung, parts in enumerate(LADDER) for part in parts}
# What runs code that somebody else wrote, or unpacks what somebody else packed.
UNSAFE_MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("tarfile", "zipfile", "pty", "commands"),
}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save"),
    *("torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("shutil.unpack_archive", "numpy.load", "np.load", "subprocess.getoutput"),
}
SAFE_VALUES = {"shell": False, "trust_remote_code": False, "weights_only": True}
TWINS = ("_triton", "_cpu")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_twin(path: Path) -> bool:
    return path.stem.endswith(TWINS)


def public_functions(path: Path) -> set[str]:
    body = ast.parse(path.read_text()).body
    return {n.name for n in body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}


def imported_names(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full: from halfbyte.quant.weight import ..."
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.startswith("halfbyte.")]


@each_module
def test_imports_go_down_the_ladder(path):
    here = part_of(path)
    assert here in RUNG, f"{here} has no rung on the ladder"
    for name in imported_names(path):
        there = name.split(".")[1]
        if there == "__version__":
            continue
        assert there in RUNG, f"{there} has no rung on the ladder"
        assert there == here or RUNG[there] < RUNG[here], f"{here} may not import {there}"


@each_module
def test_twins_are_reached_through_their_reference(path):
    if is_twin(path):
        return  # what two kernels of one language share may stand in either
    for name in imported_names(path):
        twins = {part for part in name.split(".")[2:] if part.endswith(TWINS)}
        allowed = {path.stem + suffix for suffix in TWINS}
        assert twins <= allowed, f"{twins} is reached through its reference"


@each_module
def test_module_is_short_and_says_what_it_is(path):
    source = path.read_text()
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree)
    assert docstring, "a module starts with what it is and why"
    assert docstring.splitlines()[0].rstrip().endswith((".", ":", "?")), "the first line is whole"
    assert source.count("\n") <= 400, "two ideas in one file?"
    longest = 150 if is_twin(path) else 60
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            start = body[0].lineno if body else node.lineno
            assert node.end_lineno - start < longest, f"{node.name} is too long"


@each_module
def test_module_has_its_test_or_its_reference(path):
    if is_twin(path):
        stem = next(path.stem.removesuffix(twin) for twin in TWINS if path.stem.endswith(twin))
        reference = path.with_name(f"{stem}.py")
        assert public_functions(path) & public_functions(reference), "a twin shares its names"
    elif path.name != "__main__.py":
        place = path.relative_to(PACKAGE).parent
        assert (ROOT / "tests" / place / f"test_{path.name}").is_file()


@each_module
def test_there_is_no_shelf_for_odds_and_ends(path):
    assert path.stem not in {"utils", "common", "helpers", "constants", "misc"}


def unsafe_parts(source: str) -> list[str]:
    """Name every import and call in `source` that may run or unpack what a stranger made."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            found.append(f"{ast.unparse(node.func)}()")
            found += [f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords]
        elif isinstance(node, ast.Dict):  # of arguments
            words = zip(node.keys, node.values, strict=True)
            found += [
                f"{key.value}={ast.unparse(value)}"
                for key, value in words
                if isinstance(key, ast.Constant)
            ]
    calls = {f"{name}()" for name in UNSAFE_CALLS}
    safe = {f"{name}={value}" for name, value in SAFE_VALUES.items()}
    return [
        part
        for part in found
        if part in calls
        or part in UNSAFE_CALLS
        or part.split(".")[0] in UNSAFE_MODULES
        or (part.split("=")[0] in SAFE_VALUES and part not in safe)
    ]


@each_module
def test_runs_and_unpacks_nothing_that_a_stranger_made(path):
    assert unsafe_parts(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import zipfile as z",
        "x = eval('1')",
        "import os; os.system('true')",
        "from os import system",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "from_pretrained(path, trust_remote_code=flag)",
        "settings = {'trust_remote_code': True}",
    ],
)
def test_the_check_above_finds_what_it_is_for(source):
    assert unsafe_parts(source)


@pytest.mark.parametrize("name", halfbyte.__all__)
def test_public_names_are_there(name):
    assert getattr(halfbyte, name) is not None


def test_public_names_stand_where_they_are_defined():
    for name, module in halfbyte._EXPORTS.items():
        assert hasattr(importlib.import_module(module), name)


def test_importing_halfbyte_is_light():
    code = "import sys, halfbyte; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
