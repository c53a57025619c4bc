"""Every random draw of the package comes from (seed, purpose, ids), never from a global generator.

Two draws with the same purpose and ids are equal on every machine, rank and worker, whatever was drawn before them;
that is what makes masks, crops and orders independent of world size and of crashes.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


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


def seed_torch(seed: int, purpose: str, *ids: int | str) -> None:
    """Seed torch's global generators, for what draws from them all the same: their states are part of checkpoints."""
    torch.manual_seed(torch_generator(seed, purpose, *ids).initial_seed())


def hash_share(*ids: int | str) -> float:
    """Return a number in [0, 1) fixed by the ids alone; used to hold out a share of clips by their key."""
    return int.from_bytes(_digest(0, "share", ids)[:8], "little") / 2.0**64


def hash_int64(*ids: int | str) -> int:
    """Return a signed 64-bit number fixed by the ids alone, such as a clip's for the draws below."""
    return int.from_bytes(_digest(0, "hash", ids)[:8], "little", signed=True)


# Draws of many clips at once. They are sums and products of 64-bit integers, so that every device gives the same bits:
# SplitMix64 (Steele, Lea and Flood 2014), whose n-th output from a seed is mix(seed + n x golden), and can be had alone.


def clip_seeds(hashes_B: Tensor, seed: int, purpose: str, *ids: int | str) -> Tensor:
    """Return a seed for each clip, int64 (B,), on the device of `hashes_B` (int64, `hash_int64` of the clips' keys)."""
    return _mix(hashes_B ^ int.from_bytes(_digest(seed, purpose, ids)[:8], "little", signed=True))


def random_bits(seeds: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Return the `numbers`-th draw of each seed (int64 from 0 on; broadcast): int64 of so many random bits.

    Uniform in 0 .. 2^count - 1; of 64 bits, the first is the sign."""
    words = _mix(seeds + (numbers + 1) * _GOLDEN)
    return words if count == 64 else _shifted(words, 64 - count)


def integers_below(seeds: Tensor, bounds: Tensor) -> Tensor:
    """Return for each seed a number uniform in 0 .. bound - 1, int64; bounds (int64) up to 2^31."""
    return random_bits(seeds, torch.zeros_like(seeds), 31).mul_(bounds).bitwise_right_shift_(31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _mix(words: Tensor) -> Tensor:
    for shift, factor in _ROUNDS:
        words = _shifted(words, shift).bitwise_xor_(words).mul_(factor)
    return _shifted(words, 31).bitwise_xor_(words)


def _shifted(words: Tensor, count: int) -> Tensor:
    """Shift right and fill up with zeros; torch's own shift of int64 fills up with the sign."""
    return (words >> count).bitwise_and_((1 << (64 - count)) - 1)
