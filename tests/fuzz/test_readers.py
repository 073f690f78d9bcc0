"""Damaged files of every kind: a reader reads them or says what is wrong, quickly and in bounds.

A whole document is damaged where it means something (a value becomes an odd one, a key goes or
comes) and then where it means nothing (bytes go, come or change).
"""

import contextlib
import copy
import importlib
import json
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from halfbyte.errors import HalfbyteError

ROOT = Path(__file__).parents[2]
NAMES = [
    *("safetensors", "index", "quant_state", "rows", "adapter_config", "adapter_weights"),
    *("identity", "run", "manifest"),
]
# Python objects of a file's JSON, and the messages about them.
MOST_BYTES_FOR_EACH = 200
MOST_SECONDS = 10
ODD = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, 1, 2, 63, 64, 255, 2**31, 2**40, 2**63, 2**64, 10**30),
            *(0.5, -0.0, 1e300, float("nan"), float("inf"), "", "nf4", "fp4", "load", "__class__"),
            *(
                "../x",
                "/etc/passwd",
                "outside.safetensors",
                "link.safetensors",
                "model-1.safetensors",
            ),
            *("ring.safetensors", "folder.safetensors", "a\0b", "\ud800", "x" * 300, "(a+)+$"),
            *(
                "all-linear",
                "BF16",
                "F32",
                "U64",
                [],
                {},
                [[]],
                [0, 0],
                [0, 2**62, 2**62],
                [1] * 70,
            ),
            *({"a": {"b": []}}, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 70), max_size=4),
)


def places(value, path=()):
    """Yield the path of every value inside `value`."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def damaged_documents(draw, whole):
    """JSON of `whole` with one to three values replaced, removed or added."""
    document = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(document))
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        holder = document
        for key in path:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "remove":
            del holder[last]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = copy.deepcopy(draw(ODD))
        else:
            holder[last] = copy.deepcopy(draw(ODD))
    return json.dumps(document).encode()


@st.composite
def damaged_bytes(draw, content):
    """`content` with a piece replaced by other bytes, which may be none or more."""
    start = draw(st.integers(0, len(content)))
    length = draw(st.integers(0, 12))
    piece = draw(st.one_of(st.binary(max_size=12), st.sampled_from([b"[" * 5000, b"\xff", b"\0"])))
    return content[:start] + piece + content[start + length :]


def damaged(fuzz, target):
    """Inputs for a target, some of them whole."""
    whole = target.seed()
    kinds = [st.just(whole), damaged_bytes(whole), st.binary(max_size=40)]
    if isinstance(target.whole, bytes):
        kinds.append(damaged_bytes(whole).flatmap(damaged_bytes))
    elif whole.endswith(json.dumps(target.whole).encode()):
        kinds += [damaged_documents(target.whole).map(lambda text: target.prefix + text)] * 4
        kinds.append(st.binary(min_size=1, max_size=1).map(lambda first: first + whole[1:]))
    else:  # safetensors: the length of the header fits it again
        tail = whole[8 + len(json.dumps(target.whole)) :]
        headers = damaged_documents(target.whole)
        kinds += [headers.map(lambda text: len(text).to_bytes(8, "little") + text + tail)] * 4
    return st.one_of(kinds)


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield importlib.import_module("scripts.fuzz")


@pytest.mark.parametrize(
    "examples", [60, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
@pytest.mark.parametrize("name", NAMES)
def test_reads_or_says_what_is_wrong(fuzz, tmp_path, name, examples):
    target = fuzz.TARGETS[name]
    target.read(target.seed(), tmp_path) if name != "manifest" else None  # imports are not timed

    @settings(
        max_examples=examples // 4 if name == "run" else examples,
        deadline=None,  # the clock counts what else the machine does
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # what fails is shown as it was found
    )
    @given(damaged(fuzz, target))
    def check(data):
        tracemalloc.start()
        began = time.process_time()
        try:
            with contextlib.suppress(HalfbyteError), warnings.catch_warnings(action="ignore"):
                target.read(data, tmp_path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert time.process_time() - began < MOST_SECONDS
        assert peak < 10_000_000 + MOST_BYTES_FOR_EACH * len(data)

    check()


def test_every_reader_has_its_damaged_files(fuzz):
    assert sorted(fuzz.TARGETS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_are_read(fuzz, tmp_path, name):
    if name == "manifest":
        with pytest.raises(HalfbyteError, match="differs from its checksum"):
            fuzz.TARGETS[name].read(fuzz.TARGETS[name].seed(), tmp_path)
    else:
        fuzz.TARGETS[name].read(fuzz.TARGETS[name].seed(), tmp_path)
