"""Randomness as a pure function of (seed, step, micro-step).

Every generator is seeded before each micro-batch. So dropout masks depend on nothing that happened
before: not on evaluations in between, not on whether the run was interrupted, not on a micro-batch
that had to be computed twice. Training itself needs no saved generator; a checkpoint holds their
states all the same, for a listener of the user's that draws from them between steps.
"""

import hashlib
import random
from typing import Any, cast

import numpy as np
import torch


def seed_micro_step(seed: int, step: int, micro_step: int) -> None:
    """Seed Python's, numpy's and torch's generators (CPU and every GPU)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_step}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1  # 63 bits: what torch takes
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def generator_states() -> dict[str, Any]:
    """Return the states of the same generators as JSON values; no device is waited for."""
    name, keys, *rest = cast(tuple, np.random.get_state(legacy=True))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": [bytes(torch.cuda.get_rng_state(i).tolist()).hex() for i in devices],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Set every generator that is here to its saved state.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: these are no states of generators.
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(states["torch"]))
    if torch.cuda.is_initialized():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(_bytes(state), device)


def _bytes(digits: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(digits)), dtype=torch.uint8)
