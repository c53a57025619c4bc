"""Fixtures shared by all tests; each one is real, small and deterministic."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from support import tone

from megascale.tokenize.calibration import calibrate
from megascale.tokenize.codec import Codec, new_model, set_codebook


@pytest.fixture(scope="session")
def fitted_codec() -> Codec:
    """EnCodec's encoder calibrated on 30 s of tones, with 16 codebooks."""
    clips = [tone(2.0, 24_000, 110 * 1.2**i, seed=i) for i in range(15)]
    return calibrate(clips, num_codebooks=16, seed=0)


@pytest.fixture(scope="session")
@torch.inference_mode()
def dense_codec() -> Codec:
    """EnCodec's encoder with random weights, as full of them as trained ones: a calibrated codec's are mostly zero, so
    that a mistake in its residual blocks or its LSTM's memory would not show in a code.

    Each convolution is rescaled to zero mean and unit variance, or all latents would be alike.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model()
    audio_11S = torch.from_numpy(np.concatenate([tone(1.0, 24_000, 110 * 1.3**i, seed=i) for i in range(14)]))[
        None, None
    ]

    def rescale(conv: Any, inputs: Any, output_BCT: torch.Tensor) -> torch.Tensor:
        deviation_C, mean_C = torch.std_mean(output_BCT, dim=(0, 2))
        conv.weight_g.div_(deviation_C[:, None, None])
        conv.bias.copy_((conv.bias - mean_C) / deviation_C)
        return (output_BCT - mean_C[:, None]) / deviation_C[:, None]

    hooks = [m.register_forward_hook(rescale) for m in model.encoder.modules() if isinstance(m, torch.nn.Conv1d)]
    model.encoder(audio_11S)
    for hook in hooks:
        hook.remove()
    for i in range(16):
        set_codebook(model, i, 0.9**i * torch.randn(1024, 128, generator=generator))
    return Codec(model, 16, "random weights", published=False)


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
