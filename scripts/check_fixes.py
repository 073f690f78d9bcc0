"""Check, without a network, that no installed package has a hole that its makers have closed.

    python scripts/check_fixes.py

This knows the holes listed below and no others: where there is a network, run pip-audit too.
"""

import importlib.metadata
import sys

from packaging.version import Version

# The first version without the hole; packages that are not installed do not matter.
FIXED_IN = {
    "aiohttp": ("3.12.14", "CVE-2025-53643, request smuggling"),
    "certifi": ("2024.7.4", "CVE-2024-39689, distrusted root certificates"),
    "filelock": ("3.20.1", "CVE-2025-68146, a lock file that is a link"),
    "h11": ("0.16.0", "CVE-2025-43859, request smuggling"),
    "idna": ("3.7", "CVE-2024-3651, endless decoding"),
    "jinja2": ("3.1.6", "CVE-2025-27516, out of the sandbox that chat templates run in"),
    "protobuf": ("6.31.1", "CVE-2025-4565, endless recursion"),
    "pyarrow": ("14.0.1", "CVE-2023-47248, code in Arrow and Parquet files"),
    "pyyaml": ("5.4", "CVE-2020-14343, code in YAML"),
    "requests": ("2.32.4", "CVE-2024-47081, passwords sent to another host"),
    "starlette": ("0.49.1", "CVE-2025-62727, endless parsing of a header"),
    "torch": ("2.10.0", "CVE-2026-24747, code in pickled weights"),
    "tqdm": ("4.66.3", "CVE-2024-34062, code in arguments"),
    "urllib3": ("2.6.0", "CVE-2025-66471, small downloads that fill memory"),
}


def findings() -> list[str]:
    """Return a line for each installed package that is older than its fix."""
    lines = []
    for name, (fixed, hole) in FIXED_IN.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(installed) < Version(fixed):
            lines.append(f"{name} {installed} is older than {fixed}: {hole}")
    return lines


if __name__ == "__main__":
    found = findings()
    print("\n".join(found) or f"{len(FIXED_IN)} known holes, none open")
    sys.exit(1 if found else 0)
