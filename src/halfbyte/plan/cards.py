"""Cards that people train on, and how much of their memory tensors can have."""

import re

from halfbyte.errors import ConfigError

GIB = 2**30
# What the driver leaves of the number on the box, in GiB, as `nvidia-smi` shows it.
CARDS = {
    "rtx3070": 8.0,
    "rtx4060": 8.0,
    "rtx3060": 12.0,
    "rtx4070": 12.0,
    "rtx4060ti": 16.0,
    "rtx4080": 16.0,
    "t4": 15.0,
    "v100": 16.0,
    "rtx3090": 24.0,
    "rtx4090": 24.0,
    "l4": 22.5,
    "a10": 22.5,
    "rtx5090": 31.8,
    "a100-40gb": 39.4,
    "a6000": 47.5,
    "l40s": 44.7,
    "a100": 79.3,
    "h100": 79.2,
    "h200": 139.8,
}
SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 141)
"""Common memory sizes in GB, for the table of what fits."""
# Driver and libraries, before the first tensor: about 0.5 GiB on an H100.
CONTEXT_BYTES = GIB // 2
# What the allocator's cache cannot use, as a share of what tensors take.
SLACK = 0.03


def usable_bytes(total_bytes: int) -> int:
    """Return the bytes that tensors can have on a card, after CUDA's context and slack."""
    return int(max(total_bytes - CONTEXT_BYTES, 0) / (1 + SLACK))


def parse_size(text: str) -> int:
    """Return the bytes of `24GiB`, `24GB` or `24` (GiB).

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(gib|gb|mib|mb|g|m)?\s*", text.lower())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"expected a size such as 24GiB, got {text!r}")
    units = {"gb": 10**9, "mb": 10**6, "mib": 2**20, "m": 2**20}
    return int(float(found[1]) * units.get(found[2] or "gib", GIB))


def card_bytes(name: str) -> int:
    """Return the memory of a card by its name.

    Raises:
        ConfigError: the card is not in the table.
    """
    key = name.lower().replace(" ", "").removeprefix("nvidia")
    if key not in CARDS:
        raise ConfigError(
            f"unknown card {name!r}",
            hint=f"known are {', '.join(CARDS)}; or give --vram 24GiB",
        )
    return int(CARDS[key] * GIB)
