"""What the verbs print: aligned names, readable sizes, and quiet libraries."""

import warnings

from halfbyte.cli.display import count, print_facts, progress_bar, quieten, size


def test_names_are_aligned(capsys):
    print_facts("title", {"a": 1, "long": "x" * 100})
    assert capsys.readouterr().out == f"title\n  a     1\n  long  {'x' * 100}\n"


def test_sizes_and_counts():
    assert [size(n) for n in (0, 1023, 1536, 2**30, 2**43)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 GiB",
        "8.0 TiB",
    ]
    assert [count(n) for n in (999, 155_000, 4_200_000, 8_030_000_000)] == [
        "999",
        "155 K",
        "4.2 M",
        "8.03 B",
    ]


def test_bars_are_for_terminals(capsys):
    with progress_bar() as bar:
        bar.advance(bar.add_task("x", total=2))
    assert capsys.readouterr().err == ""


def test_other_libraries_futures_are_not_shown(recwarn):
    with warnings.catch_warnings():
        quieten()
        warnings.warn("later", FutureWarning, stacklevel=1)
    assert not [w for w in recwarn if w.category is FutureWarning]
