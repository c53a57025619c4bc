"""The encoder in tiles: every code that of `encodec` itself, whatever a clip's length."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from support import tone

from megascale.errors import ConfigError
from megascale.tokenize.encoder import BatchedEncoder, TiledEncoder, _one_thread

# a tile has 20,480 samples, a segment 245,760; up to 20,480 with its padding of 6, a clip's first layer has another kernel
LENGTHS = [1, 6, 7, 8, 319, 320, 321, 5_000, 20_474, 20_475, 20_480, 40_959, 40_960, 40_961, 61_447]
LENGTHS += [245_761, 491_520, *(pytest.param(samples, marks=pytest.mark.slow) for samples in (491_519, 700_001))]


def sound(samples: int) -> np.ndarray:
    """Notes in noise, so that every stretch of it is different."""
    notes = [tone(0.7, 24_000, 90 * 1.21 ** (i % 20), seed=i) for i in range(samples // 16_800 + 1)]
    return np.concatenate(notes)[:samples]


@torch.inference_mode()
def encodec_codes(codec, audio_S: np.ndarray) -> np.ndarray:
    latent_1DT = codec.model.encoder(torch.from_numpy(audio_S)[None, None])
    return codec.model.quantizer.vq.encode(latent_1DT, n_q=16)[:, 0].numpy()


@torch.inference_mode()
def latents(tiled: TiledEncoder, clip_S: np.ndarray) -> torch.Tensor:
    """What its quantizer is given for a clip, (D, T)."""
    with _one_thread():
        return torch.cat(list(tiled._latents(clip_S)), dim=1)


@torch.inference_mode()
def assert_as_encodec(codec, clip_S: np.ndarray) -> None:
    """Hold the latents against each other, too: codes alone would hide most roundings."""
    theirs_DT = codec.model.encoder(torch.from_numpy(clip_S)[None, None])[0]
    assert torch.equal(latents(TiledEncoder(codec.model), clip_S), theirs_DT), len(clip_S)
    assert np.array_equal(codec.encode([clip_S], 16)[0], encodec_codes(codec, clip_S)), len(clip_S)


@pytest.mark.parametrize("samples", LENGTHS)
def test_every_code_is_that_of_encodec(dense_codec, one_thread, samples):
    assert_as_encodec(dense_codec, sound(samples))


def test_every_code_is_that_of_encodec_whatever_is_left_of_the_last_frame(dense_codec, one_thread):
    """The last tile's convolutions are padded by what is missing of their strides: 2, 4, 5 and 8."""
    for rest in range(0, 320, 11):
        assert_as_encodec(dense_codec, sound(960 + rest))


def test_every_codebook_that_is_compared_is_used(dense_codec):
    (codes_QT,) = dense_codec.encode([sound(60_000)], 16)
    assert min(len(set(codes_T)) for codes_T in codes_QT.tolist()) > 10


def test_codes_do_not_depend_on_the_number_of_threads(dense_codec, one_thread):
    clip_S = sound(300_000)
    encoder = TiledEncoder(dense_codec.model)
    alone_DT = latents(encoder, clip_S)
    torch.set_num_threads(3)
    assert torch.equal(latents(encoder, clip_S), alone_DT)
    assert torch.get_num_threads() == 3


def test_tile_that_forgot_what_was_before_it_would_show(dense_codec):
    """The negative control of the tests above: a cut where no clip ends changes codes there."""
    clip_S = sound(48_000)
    (whole_QT,), halves = dense_codec.encode([clip_S], 16), dense_codec.encode([clip_S[:24_000], clip_S[24_000:]], 16)
    assert np.array_equal(whole_QT[:, :75], halves[0])  # causal: what comes later changes nothing before it
    assert (whole_QT[0, 75:] != halves[1][0]).mean() > 0.01


MEMORY = """
import resource, sys
import numpy as np
from megascale.tokenize.codec import load_codec
codec = load_codec(sys.argv[1])
sound_S = np.random.default_rng(0).uniform(-0.3, 0.3, 24_000 * 90).astype(np.float32)
codec.encode([sound_S[: 24_000 * 11]], 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
codec.encode([sound_S], 2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_a_clips_length(dense_codec, tmp_path):
    (tmp_path / "codec.safetensors").write_bytes(dense_codec.to_bytes())
    line = [sys.executable, "-c", MEMORY, str(tmp_path / "codec.safetensors")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100  # MB for 90 s, of which encodec's first layer alone makes 280


def test_batch_of_equal_lengths_has_encodecs_codes(dense_codec, one_thread, capsys):
    """Codebook 0 exactly; deeper residuals are close calls, which a batch's sums decide otherwise now and then."""
    clips = [CLIPS[n] for n in (0, 2, 1, 0, 2)]
    ours = BatchedEncoder(dense_codec.model, "cpu", "fp32").encode(clips, 16)
    theirs = [encodec_codes(dense_codec, clip_S) for clip_S in clips]
    assert [codes_QT.shape for codes_QT in ours] == [codes_QT.shape for codes_QT in theirs]
    assert all(codes_QT.dtype == np.int16 for codes_QT in ours)
    ours_QN, theirs_QN = np.concatenate(ours, axis=1), np.concatenate(theirs, axis=1)
    share = float((ours_QN != theirs_QN).mean())
    with capsys.disabled():
        print(f"\n  in a batch, codes that differ from encodec's: {share:.5%} of {ours_QN.size}")
    assert np.array_equal(ours_QN[0], theirs_QN[0])
    assert share < 1e-3


CLIPS = [sound(n) for n in (24_000, 30_001, 36_000)]


def test_precision_that_changes_too_many_codes_is_refused_with_the_share(dense_codec):
    assert BatchedEncoder(dense_codec.model, "cpu", "fp32").check_precision(CLIPS, 16) == (0.0, 0.0)
    encoder = BatchedEncoder(dense_codec.model, "cpu", "bf16")
    first, every = encoder.shares_changed(CLIPS, 16)
    assert 0.005 < first <= 1 and first <= every <= 1  # deeper codebooks code what the first leaves, and change more
    with pytest.raises(
        ConfigError, match=rf"tokenize\.codec\.precision=bf16: changes {first:.2%} of codebook 0's codes"
    ):
        encoder.check_precision(CLIPS, 16)
    assert not encoder.is_checked
