"""halfbyte version."""

import halfbyte


def test_it_prints_the_version(run):
    assert run("version").stdout == f"{halfbyte.__version__}\n"
