"""The memory that loading takes, as benchmarks/load_rss.py measures it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "load_rss.py"


@pytest.mark.slow
@pytest.mark.parametrize("through", ["halfbyte", "transformers", "quantize"])
def test_a_gigabyte_loads_within_its_bound(through):
    command = [sys.executable, BENCHMARK, "--through", through]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=290)
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["checkpoint_bytes"] > 1e9
    assert measured["shards"] > 1
    assert measured["peak_rss_bytes"] <= measured["limit_bytes"]
