"""Fixtures shared by all tests; each one is real, small and deterministic."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from support import tone

from megascale.tokenize.codec import Codec, calibrate


@pytest.fixture(scope="session")
def fitted_codec() -> Codec:
    """EnCodec's encoder calibrated on 30 s of tones, with 16 codebooks."""
    clips = [tone(2.0, 24_000, 110 * 1.2**i, seed=i) for i in range(15)]
    return calibrate(clips, num_codebooks=16, seed=0)


@pytest.fixture(scope="module")
def process_group():
    """One gloo process on one thread; what the launcher would have set is taken back, so that other tests' jobs don't
    inherit it."""
    from megascale.train.engine import init_distributed

    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    init_distributed()
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def one_thread():
    """With more, `encodec` itself rounds otherwise where the threads' shares of a layer meet."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
