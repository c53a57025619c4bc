"""Every random draw of the package comes from (seed, purpose, ids), never from a global generator.

Two draws with the same purpose and ids are equal on every machine, rank and worker, whatever was drawn before them;
that is what makes masks, crops and orders independent of world size and of crashes.
"""

import hashlib

import numpy as np
import torch


def _digest(seed: int, purpose: str, ids: tuple[int | str, ...]) -> bytes:
    # repr keeps 1 and "1" apart, and the tuple keeps ("a", "b") apart from ("ab",)
    return hashlib.blake2b(repr((seed, purpose, ids)).encode(), digest_size=16).digest()


def generator(seed: int, purpose: str, *ids: int | str) -> np.random.Generator:
    """Return a NumPy generator that depends on nothing but its arguments."""
    key = np.frombuffer(_digest(seed, purpose, ids), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def torch_generator(seed: int, purpose: str, *ids: int | str) -> torch.Generator:
    """Return a CPU torch generator that depends on nothing but its arguments."""
    state = int.from_bytes(_digest(seed, purpose, ids)[:8], "little") >> 1  # manual_seed takes 63 bits
    return torch.Generator().manual_seed(state)


def hash_share(*ids: int | str) -> float:
    """Return a number in [0, 1) fixed by the ids alone; used to hold out a share of clips by their key."""
    return int.from_bytes(_digest(0, "share", ids)[:8], "little") / 2.0**64
