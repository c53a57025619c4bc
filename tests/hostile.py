"""What a stranger's folder may hold: 90 kinds of file, each with what has to become of it."""

import json
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import containers
import numpy as np
import soundfile
from support import tone

from megascale.tokens import write_ecdc

TOKENISED, LEFT_OUT = "tokenised", "left out"  # anything else is a pattern that the reason for quarantine matches
RATE_HZ = 16_000
NOT_AUDIO = "not an audio file"
TRUNCATED = "truncated"


def make_all(root: Path, codec_name: str) -> dict[str, str]:
    """Fill a folder; return what is expected of each path in it. `codec_name` is the job's codec."""
    root.mkdir(parents=True)
    expected: dict[str, str] = {}
    made = [*_headers(), *_wrong_content(), *_ecdc(codec_name)]
    for name, data, outcome in made:
        (root / name).write_bytes(data)
        expected[name] = outcome
    for kinds in (_encodings, _names, _cut, _not_files):
        expected |= kinds(root)
    return expected


def _samples(seconds: float = 0.5, rate_hz: int = RATE_HZ) -> np.ndarray:
    return tone(seconds, rate_hz, 440)


def _pcm(seconds: float = 0.5) -> bytes:
    return (_samples(seconds) * 32_000).astype("<i2").tobytes()


def wav(
    data: bytes, rate_hz: int = RATE_HZ, channels: int = 1, width: int = 2, tag: int = 1, claimed: int | None = None,
    align: int | None = None, before: bytes = b"", after: bytes = b"",
) -> bytes:  # fmt: skip
    """Build a WAV of which every field may lie."""
    align = width * channels if align is None else align
    align, rate_bytes = align & 0xFFFF, rate_hz * width * channels & 0xFFFFFFFF
    facts = struct.pack("<IHHIIHH", 16, tag, channels, rate_hz, rate_bytes, align, 8 * width)
    size = struct.pack("<I", len(data) if claimed is None else claimed)
    body = b"WAVEfmt " + facts + before + b"data" + size + data + after
    return b"RIFF" + struct.pack("<I", min(len(body), 0xFFFFFFFF)) + body


def _headers() -> Iterator[tuple[str, bytes, str]]:
    """WAV headers that lie, and some that only look so."""
    pcm, float32 = _pcm(), _samples().astype("<f4")
    eight_C = np.repeat(float32[:, None], 8, axis=1)
    yield "control.wav", wav(pcm), TOKENISED
    yield "header_only.wav", wav(b"", claimed=32_000), TRUNCATED
    yield "no_samples.wav", wav(b""), "announces no audio"
    yield "no_data_chunk.wav", wav(pcm)[:36], f"{NOT_AUDIO}|announces no audio"
    yield "half_header.wav", wav(pcm)[:20], NOT_AUDIO
    yield "riff_only.wav", b"RIFF", NOT_AUDIO
    yield "truncated.wav", wav(pcm)[:5000], TRUNCATED
    yield "claims_4gb.wav", wav(pcm, claimed=0xFFFFFF00), TRUNCATED
    yield "claims_unknown.wav", wav(pcm, claimed=0xFFFFFFFF), TRUNCATED
    yield "claims_2gb.wav", wav(pcm, claimed=0x7FFFFFFF), TRUNCATED
    yield "zero_hz.wav", wav(pcm, rate_hz=0), f"{NOT_AUDIO}|0 Hz"
    yield "one_hz.wav", wav(pcm, rate_hz=1), "1 Hz in its header"
    yield "four_ghz.wav", wav(pcm, rate_hz=0xFFFFFFFF), f"{NOT_AUDIO}|Hz in its header"
    yield "two_ghz.wav", wav(pcm, rate_hz=0x7FFFFFFF), "Hz in its header"
    yield "zero_channels.wav", wav(pcm, channels=0), NOT_AUDIO
    yield "eight_channels.wav", wav(eight_C.tobytes(), channels=8, width=4, tag=3), TOKENISED
    yield "255_channels.wav", wav(np.tile(np.frombuffer(pcm, "<i2")[:, None], 255).tobytes(), channels=255), TOKENISED
    yield "65535_channels.wav", wav(pcm * 20, channels=65_535), NOT_AUDIO
    yield "wrong_align.wav", wav(pcm, align=7), TOKENISED
    yield "zero_align.wav", wav(pcm, align=0), TOKENISED
    yield "unknown_codec.wav", wav(pcm, tag=0x1234), NOT_AUDIO
    yield "zero_bits.wav", wav(pcm, width=0), f"{NOT_AUDIO}|announces no audio"
    yield "odd_chunk.wav", wav(pcm, before=b"junk" + struct.pack("<I", 3) + b"abc\0"), TOKENISED
    yield "list_before_data.wav", wav(pcm, before=b"LIST" + struct.pack("<I", 8) + b"INFOISFT"), TOKENISED
    yield "chunk_of_4gb.wav", wav(pcm, before=b"LIST" + struct.pack("<I", 0xFFFFFFF0)), NOT_AUDIO
    yield "garbage_after.wav", wav(pcm, after=bytes(range(256)) * 8), TOKENISED
    yield "odd_bytes.wav", wav(pcm[:-1]), TOKENISED
    spoilt = float32.copy()
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus_inf", -np.inf)):
        spoilt[100:200:7] = value
        yield f"{name}.wav", wav(spoilt.tobytes(), width=4, tag=3), "not finite"
    yield "huge_values.wav", wav((float32 * 1e30).tobytes(), width=4, tag=3), TOKENISED
    yield "largest_values.wav", wav(np.full(8000, 3e38, "<f4").tobytes(), width=4, tag=3), TOKENISED
    yield "silence.wav", wav(bytes(16_000)), TOKENISED
    yield "dc.wav", wav(np.full(8000, 16_000, "<i2").tobytes()), TOKENISED
    yield "full_scale.wav", wav(np.full(8000, -32_768, "<i2").tobytes()), TOKENISED
    yield "one_sample.wav", wav(pcm[:2]), TOKENISED


def _wrong_content() -> Iterator[tuple[str, bytes, str]]:
    """Other files under an audio name."""
    noise = np.random.default_rng(1).bytes(4096)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(200)
    html = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body>no</body></html>" * 20
    id3 = b"ID3\x04\0\0" + bytes([0, 0, 0x0F, 0x76]) + bytes(2038)
    for suffix in ("wav", "flac", "ogg", "mp3", "aiff", "au", "opus", "m4a", "webm", "aac", "wma", "mka", "mp4"):
        yield f"text.{suffix}", b"These are the notes of the session.\n" * 200, NOT_AUDIO
        yield f"empty.{suffix}", b"", "an empty file"
    for suffix in ("flac", "mp3", "ogg", "m4a"):
        yield f"noise.{suffix}", noise, NOT_AUDIO
    yield "zeros.mp3", bytes(10_000), NOT_AUDIO
    yield "error_page.mp3", html, NOT_AUDIO
    yield "picture.mp3", png, NOT_AUDIO
    yield "id3_only.mp3", id3, f"{NOT_AUDIO}|announces no audio"
    yield "playlist.m4a", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n", NOT_AUDIO
    yield "free_format.mp3", (b"\xff\xfb\x00\x00" + bytes(500)) * 20, TOKENISED
    yield "really_a.mp3", wav(_pcm()), TOKENISED
    yield "nothing_but_boxes.m4a", b"\0\0\0\x08free" * 5000, NOT_AUDIO
    yield "no_moov.m4a", b"\0\0\0\x14ftypM4A \0\0\0\0isom" + b"\0\0\x10\x08mdat" + noise, NOT_AUDIO
    yield "box_of_exabytes.m4a", b"\0\0\0\x14ftypM4A \0\0\0\0isom" + b"\0\0\0\x01mdat" + b"\x7f" * 8 + noise, TRUNCATED
    yield "ebml_only.webm", bytes.fromhex("1A45DFA3") + b"\x01" + b"\xff" * 40, NOT_AUDIO
    yield "asf_only.wma", bytes.fromhex("3026B2758E66CF11A6D900AA0062CE6C") + noise, NOT_AUDIO
    yield "adts_noise.aac", b"\xff\xf1\x50\x80" + noise, f"{NOT_AUDIO}|cannot be decoded|announces no audio"


def _ecdc(name: str) -> Iterator[tuple[str, bytes, str]]:
    """Streams of codes."""
    codes_QT = np.random.default_rng(2).integers(0, 1024, (2, 75))

    def stream(meta: object, payload: bytes = bytes(188), version: int = 0, magic: bytes = b"ECDC") -> bytes:
        text = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
        return struct.pack("!4sBI", magic, version, len(text)) + text + payload

    good = write_ecdc(codes_QT, 24_000, name)
    facts = {"m": name, "al": 24_000, "nc": 2, "lm": False}
    yield "good.ecdc", good, TOKENISED
    yield "more_codebooks.ecdc", write_ecdc(np.tile(codes_QT, (16, 1)), 24_000, name), TOKENISED
    yield "other_header.ecdc", stream({**facts, "extra": 1}, good[-188:]), TOKENISED
    yield "empty.ecdc", b"", "too short for an .ecdc header"
    yield "text.ecdc", b"These are the notes.\n" * 9, "not an .ecdc stream"
    yield "version_1.ecdc", stream(facts, version=1), "not an .ecdc stream"
    yield "truncated.ecdc", good[:-1], TRUNCATED
    yield "header_cut.ecdc", good[:20], "truncated in its header"
    yield "trailing.ecdc", good + b"garbage", "longer than its header says"
    yield "language_model.ecdc", stream({**facts, "lm": True}), "lm: true"
    yield "48_khz.ecdc", stream({**facts, "m": "encodec_48khz"}), "codec 'encodec_48khz'"
    yield "published.ecdc", write_ecdc(codes_QT, 24_000, "encodec_24khz"), "codes of encodec_24khz, and this job's"
    yield "other_codec.ecdc", write_ecdc(codes_QT, 24_000, "encodec_24khz+00000000"), "codes of encodec_24khz.00000000"
    yield "one_codebook.ecdc", write_ecdc(codes_QT[:1], 24_000, name), "holds 1 codebooks, 2 were asked for"
    yield "negative.ecdc", stream({**facts, "al": -1}), "impossible header"
    yield "zero_length.ecdc", stream({**facts, "al": 0}), "impossible header"
    yield "terabytes.ecdc", stream({**facts, "al": 10**12}), "max_seconds"
    yield "past_numbers.ecdc", stream({**facts, "al": 10**400}), "impossible header|max_seconds|broken .ecdc header"
    yield "33_codebooks.ecdc", stream({**facts, "nc": 33}), "impossible header"
    yield "text_for_numbers.ecdc", stream({**facts, "al": "24000"}), "broken .ecdc header"
    yield "nan_length.ecdc", stream(json.dumps({**facts, "al": float("nan")}).encode()), "broken .ecdc header"
    yield "deep_json.ecdc", stream(b"[" * 900), "broken .ecdc header"
    yield "not_utf8.ecdc", stream(b"\xff\xfe{}"), "broken .ecdc header"
    yield "json_bomb.ecdc", stream(b"[" * 10**6), "broken .ecdc header: 1000000 bytes long"
    yield "header_of_4gb.ecdc", struct.pack("!4sBI", b"ECDC", 0, 0xFFFFFFFF) + b"{}", "broken .ecdc header"


def _encodings(root: Path) -> dict[str, str]:
    """Rare but right ways to keep samples."""
    made = {}
    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610"):
        soundfile.write(root / f"{subtype}.wav", _samples(), RATE_HZ, subtype=subtype)
        made[f"{subtype}.wav"] = TOKENISED
    for name, container in (("rf64.wav", "RF64"), ("wavex.wav", "WAVEX"), ("w64.wav", "W64"), ("caf.wav", "CAF")):
        soundfile.write(root / name, _samples(), RATE_HZ, format=container)
        made[name] = TOKENISED
    for name, rate_hz in (("x.aiff", 44_100), ("x.au", 8000), ("x.flac", 96_000), ("x.ogg", 22_050), ("x.mp3", 11_025)):
        soundfile.write(root / name, _samples(rate_hz=rate_hz), rate_hz)
        made[name] = TOKENISED
    for suffix in ("opus", "m4a", "mp4", "webm", "mka", "aac", "wma"):
        containers.write(root / f"x.{suffix}", _samples(1.0, 48_000), 48_000)
        made[f"x.{suffix}"] = TOKENISED
    soundfile.write(root / "192khz.wav", _samples(rate_hz=192_000), 192_000)
    soundfile.write(root / "chained.ogg", _samples(2.0, 22_050), 22_050)
    (root / "chained.ogg").write_bytes((root / "x.ogg").read_bytes() + (root / "chained.ogg").read_bytes())
    return made | {"192khz.wav": TOKENISED, "chained.ogg": "only the first could be read"}


def _names(root: Path) -> dict[str, str]:
    """Names that break what splits, prints or quotes them."""
    names = [
        "ünï çødé 音楽 🎵.wav",
        "two  spaces and\ttab.wav",
        'quote\'s "double" $HOME `id` ; & #.wav',
        "new\nline.wav",
        "-rf.wav",
        'comma,"csv".wav',
        "per%20cent ? [brackets] *.wav",
        os.fsdecode(b"latin1_\xe9.wav"),
        "long_" + "n" * 246 + ".wav",
        "UPPER.WAV",
        "two.dots.wav",
    ]
    for name in names:
        (root / name).write_bytes(wav(_pcm()))
    (root / ".hidden.wav").write_bytes(wav(_pcm()))
    (root / "no_suffix").write_bytes(wav(_pcm()))
    return dict.fromkeys(names, TOKENISED) | {".hidden.wav": LEFT_OUT, "no_suffix": LEFT_OUT}


def _cut(root: Path) -> dict[str, str]:
    """Good files cut short, and damaged in their middle."""
    made = {}
    for suffix in ("aiff", "au", "flac", "ogg", "mp3", "opus", "m4a", "mp4", "webm", "mka", "aac"):
        whole = root / f"x.{suffix}"
        data = whole.read_bytes()
        (root / f"cut.{suffix}").write_bytes(data[: len(data) * 6 // 10])
        made[f"cut.{suffix}"] = f"{TRUNCATED}|{NOT_AUDIO}|cannot be decoded"
    flac, ogg = (root / "x.flac").read_bytes(), (root / "x.ogg").read_bytes()
    middle = len(flac) // 2
    (root / "garbage_inside.flac").write_bytes(flac[:middle] + bytes(200) + flac[middle + 200 :])
    (root / "bad_crc.flac").write_bytes(flac[:-1] + bytes([flac[-1] ^ 1]))
    (root / "no_end_page.ogg").write_bytes(ogg[: ogg.rfind(b"OggS")])
    # STREAMINFO's 36 bits of length are the lower ones of bytes 21 to 25
    (root / "claims_days.flac").write_bytes(flac[:21] + bytes([flac[21] | 0x0F]) + b"\xff" * 4 + flac[26:])
    return made | {
        "garbage_inside.flac": f"{TRUNCATED}|cannot be decoded",
        "bad_crc.flac": f"{TRUNCATED}|cannot be decoded",
        "no_end_page.ogg": TRUNCATED,
        "claims_days.flac": "more than .* bytes can hold",
    }


def _not_files(root: Path) -> dict[str, str]:
    """What a folder holds besides files."""
    (root / "directory.wav").mkdir()
    (root / "tree").mkdir()
    (root / "tree" / "up").symlink_to("..")
    (root / "dangling.wav").symlink_to("no_such_file.wav")
    (root / "loop_a.wav").symlink_to("loop_b.wav")
    (root / "loop_b.wav").symlink_to("loop_a.wav")
    os.mkfifo(root / "pipe.wav")
    os.mkfifo(root / "pipe.ecdc")
    os.mknod(root / "socket.wav", stat.S_IFSOCK | 0o600)
    with zipfile.ZipFile(root / "zipped.wav", "w") as archive:
        archive.writestr("inside.wav", wav(_pcm()))
    loops = "symbolic link|no such file"
    made = {"directory.wav": LEFT_OUT, "tree/up": LEFT_OUT, "dangling.wav": "no such file", "zipped.wav": NOT_AUDIO}
    made |= {"loop_a.wav": loops, "loop_b.wav": loops}
    made |= dict.fromkeys(("pipe.wav", "pipe.ecdc", "socket.wav"), "not a regular file")
    if os.geteuid() != 0:  # root reads them
        (root / "unreadable.wav").write_bytes(wav(_pcm()))
        (root / "unreadable.wav").chmod(0)
        made["unreadable.wav"] = "permission denied"
    return made
