"""Time of `halfbyte audit` on a file of rows, with nothing cached and again from its cache.

    python benchmarks/audit.py rows.jsonl --out result.json

Prints one JSON object: rows, megabytes, tokens, seconds of both runs, processor seconds of the
first (all processes), the peak of memory of all processes together (each page counted once), and
the machine's load before it, which is what the seconds are worth.
"""

import argparse
import json
import os
import resource
import tempfile
import threading
from pathlib import Path

from halfbyte.data.audit import audit
from halfbyte.data.config import DataConfig
from halfbyte.demo.base import base_path
from halfbyte.models.tokenizer import load_tokenizer


class Peak(threading.Thread):
    """The most memory that this process and its children held, in MiB, by Linux's `Pss`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.mib = 0.0
        self.done = threading.Event()

    def run(self):
        me = os.getpid()
        while not self.done.wait(0.5):
            children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
            self.mib = max(self.mib, sum(map(self.of, [str(me), *children])))

    @staticmethod
    def of(pid):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            return 0.0
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def processor_seconds():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(path, tokenizer):
    load = os.getloadavg()[0]
    peak = Peak()
    peak.start()
    with tempfile.TemporaryDirectory() as folder:
        config = DataConfig(path=path, max_length=1 << 20, cache_dir=folder)
        before = processor_seconds()
        first, gathered = audit(config, tokenizer, progress=False)
        used = processor_seconds() - before
        del gathered
        second, _ = audit(config, tokenizer, progress=False)
    peak.done.set()
    split = first.splits["train"]
    return {
        "rows": split.rows_read,
        "megabytes": round(Path(path).stat().st_size / 1e6, 1),
        "tokens": split.total_tokens,
        "seconds": round(first.seconds, 1),
        "seconds_from_cache": round(second.seconds, 1),
        "processor_seconds": round(used, 1),
        "peak_mib": round(peak.mib),
        "load_before": round(load, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="a file of rows")
    parser.add_argument("--out", help="a JSON file to write to")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.data, load_tokenizer(base_path(), 10**9)), indent=1)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
