"""Calibration: weights that can be repeated, latents that follow a log-mel spectrogram, codebooks that are used."""

import numpy as np
import pytest
import torch
from support import tone

from megascale.errors import AudioError
from megascale.spectrogram import MELS, log_mel
from megascale.synthesis import GENRES, make_mixture, make_song, make_speech
from megascale.tokenize import calibration
from megascale.tokenize.calibration import calibrate
from megascale.tokenize.codec import new_model

KEPT = 0.8  # 0.98 measured
CLIPS = [tone(2.0, 24_000, 110 * 1.2**i, seed=i) for i in range(15)]  # what fitted_codec was calibrated on


@pytest.fixture(scope="module")
def small_codec():
    """Two codebooks fitted on the least audio; 4 s."""
    return calibrate(CLIPS[:2], num_codebooks=2, seed=0)


def test_same_seed_and_audio_give_the_same_codec_and_another_seed_another(small_codec):
    state = torch.get_rng_state()
    again = calibrate(CLIPS[:2], num_codebooks=2, seed=0)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.rand(7)
    assert again.fingerprint == small_codec.fingerprint
    other = calibrate(CLIPS[:2], num_codebooks=2, seed=1)
    assert other.fingerprint != small_codec.fingerprint
    assert other.name != small_codec.name


def test_calibrated_codec_says_what_it_is(fitted_codec):
    assert fitted_codec.published is False
    assert fitted_codec.name == f"encodec_24khz+{fitted_codec.fingerprint[:8]}"
    assert fitted_codec.origin == "calibrated on 30 s, seed 0"
    assert fitted_codec.num_codebooks == 16


def test_calibrated_codes_are_spread_over_the_codebook(fitted_codec):
    codes_N = np.concatenate(fitted_codec.encode(CLIPS, 1), axis=1)[0]
    share_V = np.bincount(codes_N, minlength=1024) / len(codes_N)
    perplexity = np.exp(-sum(p * np.log(p) for p in share_V if p > 0))
    # EnCodec without calibration gives 1; 30 s of tones fill some 140 codes
    assert perplexity > 20


def test_calibrated_residual_shrinks_with_every_codebook(fitted_codec):
    audio_BS = np.stack([tone(1.0, 24_000, 95 * 1.33**i, seed=500 + i) for i in range(8)])  # not calibrated on
    with torch.inference_mode():
        latent_BDT = fitted_codec.model.encoder(torch.from_numpy(audio_BS)[:, None])
        codes_QBT = torch.from_numpy(np.stack(fitted_codec.encode(audio_BS, 16), axis=1)).long()
        errors = [
            float((latent_BDT - fitted_codec.model.quantizer.vq.decode(codes_QBT[:q])).var() / latent_BDT.var())
            for q in (1, 2, 4, 8, 16)
        ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1, "one codebook tells something of audio it has not seen"


def test_unused_codes_are_never_chosen(small_codec):
    loud_and_odd = np.stack(
        [np.random.default_rng(3).uniform(-1, 1, 24_000).astype(np.float32), np.zeros(24_000, np.float32)]
    )
    used = 4 * 75 // 16
    assert np.max(small_codec.encode(loud_and_odd, 2)) < used


@pytest.mark.parametrize(
    "clips", [[], [tone(3.9, 24_000, 300)], [tone(1.0, 24_000, 300)] * 3], ids=["none", "3.9 s", "3 s"]
)
def test_calibration_on_too_little_audio_is_refused(clips):
    with pytest.raises(AudioError, match=r"codec\.weights=calibrate needs at least 4 s"):
        calibrate(clips, num_codebooks=2, seed=0)


def test_calibration_on_silence_is_refused():
    with pytest.raises(AudioError):
        calibrate([np.zeros(5 * 24_000, np.float32)], num_codebooks=1, seed=0)


def test_silent_seconds_of_a_corpus_do_not_spoil_calibration():
    silence = np.zeros(100 * 24_000, np.float32)
    codec = calibrate([silence, CLIPS[0], CLIPS[1], CLIPS[2]], num_codebooks=1, seed=0)
    assert codec.fingerprint == calibrate(CLIPS[:3], num_codebooks=1, seed=0).fingerprint


def test_calibration_reports_every_batch_and_codebook():
    told = []
    calibrate(CLIPS[:2], num_codebooks=3, seed=0, report=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]  # 4 s of audio are one batch


def sounds(seed: int) -> list[np.ndarray]:
    """Songs, speech, noises and tones, a second each."""
    rng = np.random.default_rng(seed)
    makers = [
        lambda: make_song(rng, str(rng.choice(list(GENRES))), 1.0, 24_000),
        lambda: make_speech(rng, 1.0, 24_000),
        lambda: make_mixture(rng, 2, 1.0, 24_000),
        lambda: tone(1.0, 24_000, rng.uniform(100, 4000), seed=seed),
    ]
    return [make().astype(np.float32) for make in makers * 8]


@pytest.fixture(scope="module")
def hearing_codec():
    return calibrate(sounds(0), num_codebooks=2, seed=0)


@torch.inference_mode()
def latents(codec, audio_S: np.ndarray) -> np.ndarray:
    return codec.model.encoder(torch.from_numpy(audio_S)[None, None])[0].numpy()


def test_latents_follow_the_log_mel_spectrogram_of_sounds_that_were_not_in_the_sample(hearing_codec, monkeypatch):
    heard_MF = np.concatenate([log_mel(x) for x in sounds(0)], axis=1)
    mean_M1, deviation_M1 = heard_MF.mean(axis=1, keepdims=True), heard_MF.std(axis=1, keepdims=True)
    others = sounds(1)
    target_MF = np.concatenate([(log_mel(x) - mean_M1) / deviation_M1 for x in others], axis=1)

    def explained(codec) -> float:
        latent_MF = np.concatenate([latents(codec, x)[:MELS] for x in others], axis=1)
        return 1 - ((target_MF - latent_MF) ** 2).mean() / target_MF.var()

    assert explained(hearing_codec) > 0.5
    assert not latents(hearing_codec, others[0])[MELS:].any(), "the other dimensions say nothing"
    banks = calibration._filters

    def noise(window: int) -> np.ndarray:
        filters = banks(window)
        drawn = np.random.default_rng(0).normal(size=filters.shape).astype(filters.dtype)
        norms = np.linalg.norm(filters, axis=1, keepdims=True) / np.linalg.norm(drawn, axis=1, keepdims=True)
        return drawn * norms

    monkeypatch.setattr(calibration, "_filters", noise)
    assert explained(calibrate(sounds(0), num_codebooks=2, seed=0)) < 0.3, "the same of filters that are noise (0.1)"


def test_a_steady_tone_keeps_its_code(hearing_codec, dense_codec):
    """A masked code can then be predicted from its neighbours."""
    time_S = np.arange(24_000) / 24_000

    def share_kept(codec) -> float:
        shares = []
        for pitch_hz in (130.0, 300.0, 770.0, 1201.0, 1900.0, 4700.0):
            for start in (0.0, 1.0):
                tone_S = (0.3 * np.sin(2 * np.pi * pitch_hz * time_S + start)).astype(np.float32)
                (codes_QT,) = codec.encode([tone_S], 1)
                shares.append((codes_QT[0, 11:] == codes_QT[0, 10:-1]).mean())  # once it has begun
        return float(np.mean(shares))

    assert share_kept(hearing_codec) > KEPT
    assert share_kept(dense_codec) < KEPT / 2, "random weights follow the waveform"


@torch.inference_mode()
def test_bands_are_the_filters_rectified_and_averaged():
    """The layers before the LSTM against a plain convolution, sample by sample."""
    model = new_model()
    front = model.encoder.model[:-3]
    calibration._hear_bands(front)
    audio_S = sounds(3)[0]
    found_MT = front(torch.from_numpy(audio_S)[None, None])[0, :MELS].numpy()
    padded_S = np.pad(audio_S, (40, 0))  # causal: windows of 80 that end with each step of 40
    for band in (0, 20, 63):
        heard = [
            np.convolve(padded_S, f[::-1], "valid")[::40] for f in calibration._filters(80)[4 * band : 4 * band + 4]
        ]
        rectified = np.pad(sum(np.where(x > 0, x, np.expm1(np.minimum(3000 * x, 0)) / 3000) for x in heard), (8, 0))
        expected_T = np.convolve(rectified, np.ones(16) / 16, "valid")[::8]  # 16 steps that end with each frame of 8
        # 1.1% measured, of the ELUs that samples pass; a clip's start is reflected, not padded with zeros
        assert np.abs(found_MT[band, 3:] - expected_T[3:]).max() < 0.02 * expected_T.max()


def test_sounds_unlike_the_sample_have_latents_of_much_the_same_size():
    """Bands that were empty in the sample are heard as loud, not as thousands of times too loud."""
    rng = np.random.default_rng(0)
    full_S = (0.1 * rng.standard_normal(4 * 24_000)).astype(np.float32)
    low_S = np.convolve(full_S, np.sinc(np.arange(-64, 65) / 6) * np.hanning(129) / 6, "same").astype(np.float32)
    codec = calibrate([low_S], num_codebooks=1, seed=0)
    # 3 times measured; 126 times with a skip of 2^-20
    assert np.abs(latents(codec, full_S)).max() < 10 * np.abs(latents(codec, low_S)).max()


def test_quieter_is_lower_over_forty_decibels(hearing_codec):
    """The bands bend like a logarithm: ten times quieter moves them all down, from loud as from soft."""
    (song_S, *_) = sounds(2)
    levels = [latents(hearing_codec, 10.0**-i * song_S)[:MELS].mean() for i in range(3)]
    assert levels[0] - levels[1] > 0.5 and levels[1] - levels[2] > 0.5
