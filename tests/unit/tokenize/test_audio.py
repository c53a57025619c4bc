"""Audio: any format at any rate becomes 24 kHz mono of its length, and what cannot be trusted is refused by name."""

import errno
import io
import struct

import containers
import fsspec
import numpy as np
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem
from hostile import wav
from support import tone

from megascale.errors import AudioError, StorageError
from megascale.tokenize.audio import probe_seconds, read_clip

RATES_HZ = (8000, 16_000, 22_050, 44_100, 48_000)
SECONDS = 1.7131  # no whole number of samples at most rates


def write_wav(path, audio, rate_hz=24_000, **options):
    soundfile.write(path, audio, rate_hz, **options)
    return str(path)


def refused(url):
    with pytest.raises(AudioError) as failure:
        read_clip(url)
    text = str(failure.value)
    assert text.startswith(f"{url}: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("rate_hz", RATES_HZ)
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_any_format_and_rate_becomes_24_khz_of_its_length(tmp_path, rate_hz, suffix):
    samples = tone(SECONDS, rate_hz, 440)
    url = write_wav(tmp_path / f"x.{suffix}", samples, rate_hz)
    seconds = len(samples) / rate_hz
    assert probe_seconds(url) == seconds
    audio_S = read_clip(url)
    assert (audio_S.dtype, audio_S.ndim) == (np.float32, 1)
    # a half sample may be rounded up or down by the resampler
    assert abs(len(audio_S) - 24_000 * seconds) <= 1
    # the tone is still there: its frequency's bin is the loudest, to a bin's width
    loudest_hz = np.abs(np.fft.rfft(audio_S)).argmax() / (len(audio_S) / 24_000)
    assert abs(loudest_hz - 440) <= 1 / seconds
    # and as loud: resampling and lossy coding move the energy of a low tone by less than 5 %
    assert np.sqrt((audio_S**2).mean()) == pytest.approx(np.sqrt((samples**2).mean()), rel=0.05)


def test_24_khz_mono_is_read_as_it_is(tmp_path):
    samples = tone(0.5, 24_000, 440)
    assert np.array_equal(read_clip(write_wav(tmp_path / "x.wav", samples, subtype="FLOAT")), samples)


@pytest.mark.parametrize("channels", [2, 8])
@pytest.mark.parametrize("rate_hz", [24_000, 44_100])
def test_channels_become_their_mean(tmp_path, channels, rate_hz):
    samples_SC = np.stack([tone(1.0, rate_hz, 200 * (c + 1), seed=c) for c in range(channels)], axis=1)
    many = read_clip(write_wav(tmp_path / "many.wav", samples_SC, rate_hz, subtype="FLOAT"))
    one = read_clip(write_wav(tmp_path / "one.wav", samples_SC.mean(axis=1), rate_hz, subtype="FLOAT"))
    # float32: the two sums differ in their order only
    np.testing.assert_allclose(many, one, atol=1e-6)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_stretch_equals_slice_of_the_whole(tmp_path, suffix):
    url = write_wav(tmp_path / f"x.{suffix}", tone(2.0, 24_000, 440))
    whole = read_clip(url)
    for start, seconds in [(0.0, 0.5), (0.5, 0.75), (1.25, 0.75), (0.0001, 1.0)]:
        first, count = round(start * 24_000), round(seconds * 24_000)
        assert np.array_equal(read_clip(url, start, seconds), whole[first : first + count])
    assert np.array_equal(read_clip(url, 1.25), whole[30_000:])


def test_stretch_of_an_mp3_equals_its_slice(tmp_path):
    url = write_wav(tmp_path / "x.mp3", tone(2.0, 24_000, 440))
    whole = read_clip(url)
    # an mp3 frame borrows bits from frames before it, which a seek has not decoded
    np.testing.assert_allclose(read_clip(url, 0.5, 0.75), whole[12_000:30_000], atol=1e-3)


@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_resampled_stretch_equals_the_slice_away_from_its_ends(tmp_path, rate_hz):
    url = write_wav(tmp_path / "x.wav", tone(3.0, rate_hz, 440), rate_hz)
    stretch, whole = read_clip(url, 1.0, 1.0), read_clip(url)
    assert len(stretch) == 24_000
    # the resampler's filter reaches past the stretch; 0.1 s inside only float32 rounding is left
    np.testing.assert_allclose(stretch[2400:-2400], whole[24_000:48_000][2400:-2400], atol=1e-5)


def test_clips_of_one_length_have_one_number_of_samples(tmp_path):
    url = write_wav(tmp_path / "x.wav", tone(5.0, 22_050, 440), 22_050)
    assert {len(read_clip(url, start, 0.75)) for start in (0.0, 0.75, 1.5, 2.25, 3.0)} == {len(read_clip(url, 0, 0.75))}


def test_silence_is_zeros(tmp_path):
    for rate_hz in (24_000, 44_100):
        audio_S = read_clip(write_wav(tmp_path / "x.wav", np.zeros(rate_hz), rate_hz))
        assert np.array_equal(audio_S, np.zeros(24_000, np.float32))


def test_stretch_longer_than_the_file_by_less_than_a_sample_is_read(tmp_path):
    url = write_wav(tmp_path / "x.wav", tone(1.0, 24_000, 440))
    assert len(read_clip(url, 0.5, 0.5 + 1 / 24_000)) == 12_000


@pytest.mark.parametrize(
    ("start", "seconds"),
    [(1.0, None), (5.0, None), (5.0, 1.0), (0.5, 0.6), (0.0, 1.1), (0.0, 0.0), (0.0, -1.0), (-0.5, 0.2)],
)
def test_stretch_outside_the_file_is_refused_by_name(tmp_path, start, seconds):
    url = write_wav(tmp_path / "x.wav", tone(1.0, 24_000, 440))
    with pytest.raises(AudioError, match=f"^{url}: "):
        read_clip(url, start, seconds)


@pytest.mark.parametrize("start", [float("nan"), float("inf")])
def test_stretch_that_is_no_number_is_refused_by_name(tmp_path, start):
    url = write_wav(tmp_path / "x.wav", tone(1.0, 24_000, 440))
    for arguments in ((start, None), (0.0, start)):
        with pytest.raises(AudioError, match=f"^{url}: "):
            read_clip(url, *arguments)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_text_with_an_audio_name_is_refused(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_text("These are the notes of the session.\n" * 500)
    assert "not an audio file" in refused(str(path))
    with pytest.raises(AudioError, match=f"^{path}: not an audio file"):
        probe_seconds(str(path))


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"")
    assert refused(str(tmp_path / "x.wav")).endswith(": an empty file")


def test_header_without_audio_is_refused(tmp_path):
    url = write_wav(tmp_path / "x.wav", np.zeros(0))
    assert "announces no audio" in refused(url)
    with pytest.raises(AudioError, match="announces no audio"):
        probe_seconds(url)


@pytest.mark.parametrize("options", [{"subtype": "PCM_16"}, {"subtype": "FLOAT"}, {"format": "WAVEX"}], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.002, 0.3, 0.5, 0.999, 1.0])
def test_truncated_wav_is_refused_wherever_it_is_cut(tmp_path, options, share):
    whole = io.BytesIO()
    soundfile.write(whole, tone(1.0, 24_000, 440), 24_000, **({"format": "WAV"} | options))
    data = whole.getvalue()
    path = tmp_path / "x.wav"
    path.write_bytes(data[: min(len(data) - 1, 2 + round(share * len(data)))])
    refused(str(path))
    with pytest.raises(AudioError, match=f"^{path}: "):
        probe_seconds(str(path))


@pytest.mark.parametrize("claimed", [0xFFFFFFFF, 0x7FFFFFFF, 50_000])
def test_wav_that_claims_more_than_it_has_is_refused(tmp_path, claimed):
    url = write_wav(tmp_path / "x.wav", tone(1.0, 24_000, 440), subtype="PCM_16")
    data = bytearray((tmp_path / "x.wav").read_bytes())
    position = data.index(b"data") + 4
    data[position : position + 4] = struct.pack("<I", claimed)
    (tmp_path / "x.wav").write_bytes(data)
    assert f"truncated: 48000 bytes of audio of {claimed} in its header" in refused(url)


def test_stretch_longer_than_a_clip_may_be_is_refused(tmp_path):
    url = write_wav(tmp_path / "x.wav", tone(3.0, 24_000, 440))
    assert len(read_clip(url, 0.5, 2.0, most_seconds=2.0)) == 48_000
    for stretch in ((0.0, 2.1), (0.0, None)):
        with pytest.raises(AudioError, match=rf"^{url}: . s in one clip, clips\.max_seconds=2; clips\.seconds cuts"):
            read_clip(url, *stretch, most_seconds=2.0)


@pytest.mark.parametrize("rate_hz", [1, 999, 1_000_001, 0x7FFFFFFF])
def test_rate_of_no_recording_is_refused(tmp_path, rate_hz):
    (tmp_path / "x.wav").write_bytes(wav(bytes(2000), rate_hz=rate_hz))
    assert f"a sample rate of {rate_hz} Hz in its header" in refused(str(tmp_path / "x.wav"))


def test_header_that_announces_more_samples_than_the_file_can_hold_is_refused(tmp_path):
    """At planning too: cut to clips, this one would be half a million."""
    url = write_wav(tmp_path / "x.flac", tone(1.0, 24_000, 440))
    data = bytearray((tmp_path / "x.flac").read_bytes())
    data[21] |= 0x0F  # STREAMINFO's 36 bits of length
    data[22:26] = b"\xff" * 4
    (tmp_path / "x.flac").write_bytes(data)
    assert "bytes can hold" in refused(url)
    with pytest.raises(AudioError, match="bytes can hold"):
        probe_seconds(url)


def test_many_channels_in_several_blocks_equal_their_mean(tmp_path):
    samples_SC = np.random.default_rng(0).uniform(-1, 1, (150_000, 8)).astype(np.float32)
    url = write_wav(tmp_path / "x.wav", samples_SC, subtype="FLOAT")
    assert np.array_equal(read_clip(url), samples_SC.mean(axis=1))


def test_wav_with_chunks_before_and_after_its_audio_is_read(tmp_path):
    url = write_wav(tmp_path / "x.wav", tone(0.5, 24_000, 440), subtype="PCM_16")
    expected = read_clip(url)
    data = (tmp_path / "x.wav").read_bytes()
    at = data.index(b"data")
    odd = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"  # an odd chunk is padded to an even size
    body = data[8:at] + odd + data[at:] + odd
    (tmp_path / "x.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert np.array_equal(read_clip(url), expected)


@pytest.mark.parametrize(("count", "whole"), [(900, True), (1000, False), (1_000_000, False)])
def test_wav_of_nothing_but_chunks_is_not_walked_to_its_end(tmp_path, count, whole):
    body = wav(bytes(48_000), before=b"junk\0\0\0\0" * count)[8:]
    (tmp_path / "x.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    if whole:
        assert len(read_clip(str(tmp_path / "x.wav"))) == 36_000  # 24,000 samples at 16 kHz
    else:
        assert "no audio in its first 1000 chunks" in refused(str(tmp_path / "x.wav"))


@pytest.mark.parametrize(("suffix", "options"), [("ogg", {}), ("opus", {"format": "OGG", "subtype": "OPUS"})])
def test_ogg_of_several_streams_is_refused_because_only_the_first_would_be_read(tmp_path, suffix, options):
    links = [tmp_path / f"{seconds}.{suffix}" for seconds in (1, 2)]
    for seconds, link in enumerate(links, start=1):
        soundfile.write(link, tone(seconds, 48_000, 440), 48_000, **options)
    assert len(read_clip(str(links[0]))) == 24_000
    path = tmp_path / f"chained.{suffix}"
    path.write_bytes(b"".join(link.read_bytes() for link in links))
    assert soundfile.info(path).duration == 1.0  # what libsndfile takes for the whole
    assert "only the first could be read" in refused(str(path))


@pytest.mark.parametrize("suffix", ["flac", "mp3", "aiff", "au", "ogg"])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.98])
def test_other_truncated_file_is_refused(tmp_path, suffix, share):
    whole = tmp_path / f"whole.{suffix}"
    soundfile.write(whole, tone(2.0, 24_000, 440), 24_000)
    data = whole.read_bytes()
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data[: round(share * len(data))])
    refused(str(path))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.98])
def test_truncated_wav_of_the_64_bit_kind_is_refused(tmp_path, share):
    whole = tmp_path / "whole.wav"
    soundfile.write(whole, tone(1.0, 24_000, 440), 24_000, format="RF64")
    assert len(read_clip(str(whole))) == 24_000
    data = whole.read_bytes()
    path = tmp_path / "x.wav"
    path.write_bytes(data[: round(share * len(data))])
    refused(str(path))


def test_flac_damaged_in_its_middle_is_refused(tmp_path):
    url = write_wav(tmp_path / "x.flac", tone(2.0, 24_000, 440))
    data = bytearray((tmp_path / "x.flac").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    (tmp_path / "x.flac").write_bytes(data)
    refused(url)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate_hz", [24_000, 44_100])
def test_samples_that_are_not_finite_are_refused(tmp_path, bad, rate_hz):
    samples = tone(0.5, rate_hz, 440)
    samples[100] = bad
    url = write_wav(tmp_path / "x.wav", samples, rate_hz, subtype="FLOAT")
    assert "not finite" in refused(url)
    assert np.isfinite(read_clip(url, 0.1, 0.2)).all(), "the rest of the file is good"


def test_audio_shorter_than_a_sample_is_refused(tmp_path):
    assert "no samples left at 24000 Hz" in refused(write_wav(tmp_path / "x.wav", np.zeros(1), 96_000))


def test_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"none\.wav: no such file"):
        read_clip(str(tmp_path / "none.wav"))
    with pytest.raises(StorageError, match=r"none\.wav: no such file"):
        probe_seconds(str(tmp_path / "none.wav"))


def test_other_filesystem_gives_the_same_samples(tmp_path):
    from megascale import storage

    url = write_wav(tmp_path / "x.flac", tone(1.0, 22_050, 440), 22_050)
    storage.publish_bytes(f"memory:/{tmp_path}/x.flac", (tmp_path / "x.flac").read_bytes())
    assert np.array_equal(read_clip(f"memory:/{tmp_path}/x.flac", 0.25, 0.5), read_clip(url, 0.25, 0.5))


class Failing(MemoryFileSystem):
    """A store that fails at one read, for good."""

    protocol = "failing"
    data, reads, fails_at = b"", 0, -1

    def _open(self, path, mode="rb", **options):
        return FailingFile(self.data)


class FailingFile(io.BytesIO):
    def read(self, size=-1):
        Failing.reads += 1
        if Failing.reads == Failing.fails_at:
            raise OSError(errno.ENXIO, "gone")
        return super().read(size)


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "ogg", "opus", "mp3", "m4a", "webm"])
def test_read_that_fails_is_never_taken_for_a_shorter_or_another_recording(tmp_path, suffix):
    fsspec.register_implementation("failing", Failing, clobber=True)
    path = containers.write(tmp_path / f"x.{suffix}", tone(20.0, 48_000, 440), 48_000)
    url, Failing.data = f"failing://x.{suffix}", path.read_bytes()
    for read in (probe_seconds, read_clip):
        Failing.reads, Failing.fails_at = 0, -1
        read(url)
        total = Failing.reads
        for place in range(1, total + 1, max(1, total // 40)):
            Failing.reads, Failing.fails_at = 0, place
            with pytest.raises(StorageError, match="gone"):
                read(url)
