"""Randomness as a pure function of (seed, step, micro-step).

Every generator is seeded before each micro-batch. So dropout masks depend on nothing that happened
before: not on evaluations in between, not on whether the run was interrupted, not on a micro-batch
that had to be computed twice. There is no generator state to save, and resuming cannot restore it
wrongly.
"""

import hashlib
import random

import numpy as np
import torch


def seed_micro_step(seed: int, step: int, micro_step: int) -> None:
    """Seed Python's, numpy's and torch's generators (CPU and every GPU)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_step}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1  # 63 bits: what torch takes
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
