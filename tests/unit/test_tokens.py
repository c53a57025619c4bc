"""Tokens: our `.ecdc` is EnCodec's `.ecdc`, bit for bit, and a broken one is refused by name."""

import io
import json
import math
import struct

import numpy as np
import pytest
import torch
from support import tone

from megascale import tokens
from megascale.errors import TokenError
from megascale.tokenize.codec import _encodec

SHAPES = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 750), (3, 7), (4, 75), (5, 5), (8, 33), (16, 750), (32, 11)]


@pytest.fixture(scope="module")
def binary():
    """EnCodec's own reader and writer."""
    _encodec()
    from encodec import binary

    return binary


def random_codes(num_codebooks: int, frames: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng([num_codebooks, frames])
    samples = (frames - 1) * tokens.SAMPLES_PER_FRAME + int(rng.integers(1, tokens.SAMPLES_PER_FRAME + 1))
    return rng.integers(0, 1024, (num_codebooks, frames)), samples


def stream(meta: object, payload: bytes = b"", magic: bytes = b"ECDC", version: int = 0) -> bytes:
    text = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
    return struct.pack("!4sBI", magic, version, len(text)) + text + payload


def meta(**changes: object) -> dict[str, object]:
    return {"m": "encodec_24khz", "al": 320, "nc": 2, "lm": False} | changes


@pytest.mark.parametrize(("num_codebooks", "frames"), SHAPES)
def test_encodec_reads_what_we_write(binary, num_codebooks, frames):
    codes_QT, samples = random_codes(num_codebooks, frames)
    file = io.BytesIO(tokens.write_ecdc(codes_QT, samples, "encodec_24khz"))
    header = binary.read_ecdc_header(file)
    assert header == {"m": "encodec_24khz", "al": samples, "nc": num_codebooks, "lm": False}
    unpacker = binary.BitUnpacker(10, file)
    pulled = [[unpacker.pull() for _ in range(num_codebooks)] for _ in range(frames)]
    assert np.array_equal(np.array(pulled).T, codes_QT)
    assert not file.read(), "nothing follows the codes"


@pytest.mark.parametrize(("num_codebooks", "frames"), SHAPES)
def test_encodec_writes_the_same_bytes_and_we_read_them(binary, num_codebooks, frames):
    codes_QT, samples = random_codes(num_codebooks, frames)
    file = io.BytesIO()
    binary.write_ecdc_header(file, {"m": "encodec_24khz", "al": samples, "nc": num_codebooks, "lm": False})
    packer = binary.BitPacker(10, file)
    for code in codes_QT.T.reshape(-1).tolist():
        packer.push(code)
    packer.flush()
    assert file.getvalue() == tokens.write_ecdc(codes_QT, samples, "encodec_24khz")
    header, read_QT = tokens.read_ecdc(file.getvalue(), "x.ecdc")
    assert header == tokens.EcdcHeader("encodec_24khz", samples, num_codebooks)
    assert read_QT.dtype == np.int16
    assert np.array_equal(read_QT, codes_QT)


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 4801, 7999, 12_345])
@pytest.mark.parametrize(("bitrate_kbps", "num_codebooks"), [(1.5, 2), (12.0, 16)])
def test_compress_to_file_of_encodec_writes_our_bytes(fitted_codec, samples, bitrate_kbps, num_codebooks):
    _encodec()
    from encodec.compress import compress_to_file

    audio_S = tone(1.0, 24_000, 330, seed=samples)[:samples]
    fitted_codec.model.set_target_bandwidth(bitrate_kbps)
    theirs = io.BytesIO()
    compress_to_file(fitted_codec.model, torch.from_numpy(audio_S)[None], theirs, use_lm=False)
    (codes_QT,) = fitted_codec.encode([audio_S], num_codebooks)
    assert tokens.write_ecdc(codes_QT, samples, "encodec_24khz") == theirs.getvalue()


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.int64, np.uint64, ">i4"])
def test_any_integer_type_and_memory_layout_gives_the_same_bytes(dtype):
    codes_QT, samples = random_codes(4, 75)
    expected = tokens.write_ecdc(codes_QT, samples, "encodec_24khz")
    assert tokens.write_ecdc(codes_QT.astype(dtype), samples, "encodec_24khz") == expected
    assert tokens.write_ecdc(np.asfortranarray(codes_QT.astype(dtype)), samples, "encodec_24khz") == expected


@pytest.mark.parametrize(("bitrate_kbps", "size"), [(1.5, 1875), (12.0, 15_000)])
def test_ten_seconds_take_the_codecs_own_size(bitrate_kbps, size):
    codes_QT, _ = random_codes(tokens.codebooks_for(bitrate_kbps), 750)
    data = tokens.write_ecdc(codes_QT, 240_000, "encodec_24khz")
    _, start = tokens.read_ecdc_header(data, "x.ecdc")
    assert len(data) - start == size


def test_lower_bitrate_is_the_first_codebooks():
    codes_QT, samples = random_codes(16, 75)
    data = tokens.write_ecdc(codes_QT, samples, "encodec_24khz")
    for num_codebooks in range(1, 17):
        header, read_QT = tokens.read_ecdc(data, "x.ecdc", num_codebooks)
        assert header.num_codebooks == 16, "the header tells what is stored"
        assert np.array_equal(read_QT, codes_QT[:num_codebooks])


@pytest.mark.parametrize("rows", [1, 7, 40_000])  # the last one takes more than one block
@pytest.mark.parametrize("shift", [None, 0, 2, 4, 6, 24])
def test_words_are_unpacked_from_any_bit_of_any_row_and_packed_again(rows, shift):
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, 1024, (rows, 8)).astype(np.int16)
    packed = tokens.pack(codes)
    assert (packed.shape, packed.dtype) == ((rows, 10), np.uint8)
    moved = rng.integers(0, 256, (rows + 1, 20), dtype=np.uint8)  # what lies beside them does not matter
    bits = np.unpackbits(moved[:rows], axis=1, bitorder="little")
    for word in range(2):  # eight bytes apart: a word may begin anywhere
        at = 64 * word + (shift or 0)
        bits[:, at : at + 40] = np.unpackbits(packed[:, 5 * word : 5 * word + 5], axis=1, bitorder="little")
    moved[:rows] = np.packbits(bits, axis=1, bitorder="little")
    words = tokens.code_words(moved.tobytes(), (rows, 2), (20, 8))
    shifts = None if shift is None else np.full((rows, 1), shift, dtype=np.uint64)
    unpacked = tokens.unpack(words, shifts)
    assert unpacked.dtype == np.int16
    assert np.array_equal(unpacked, codes)


def test_more_codebooks_than_stored_are_refused():
    codes_QT, samples = random_codes(2, 5)
    with pytest.raises(TokenError, match=r"^x\.ecdc: holds 2 codebooks, 4 were asked for$"):
        tokens.read_ecdc(tokens.write_ecdc(codes_QT, samples, "encodec_24khz"), "x.ecdc", 4)


@pytest.mark.parametrize(("bitrate_kbps", "count"), [(0.75, 1), (1.5, 2), (3, 4), (6, 8), (12, 16), (24, 32)])
def test_bitrate_names_its_codebooks(bitrate_kbps, count):
    assert tokens.codebooks_for(bitrate_kbps) == count


@pytest.mark.parametrize("bitrate_kbps", [0, -1.5, 1.6, 0.5, 24.75, 1e9])
def test_bitrate_that_is_no_whole_number_of_codebooks_is_refused(bitrate_kbps):
    with pytest.raises(TokenError, match=f"bitrate_kbps={bitrate_kbps}: must be a multiple of 0.75 from 0.75 to 24"):
        tokens.codebooks_for(bitrate_kbps)


def test_frames_are_counted_exactly_where_floating_point_rounds_up():
    exact = [n * 320 for n in range(1, 20_000) if math.ceil(n * 320 / 24_000 * 75) != n]
    assert exact, "EnCodec's own formula asks for a frame too many at these lengths"
    assert all(tokens.num_frames(samples) == samples // 320 for samples in exact)
    assert [tokens.num_frames(n) for n in (1, 319, 320, 321, 240_000, 240_001)] == [1, 1, 1, 2, 750, 751]


@pytest.mark.parametrize("code", [-1, 1024, 70_000])
def test_code_out_of_range_is_refused(code):
    with pytest.raises(ValueError, match=r"0\.\.1023"):
        tokens.write_ecdc(np.array([[0, code]]), 640, "encodec_24khz")


def test_codes_that_do_not_belong_to_the_length_are_refused():
    with pytest.raises(ValueError, match="3 frames do not belong to 640 samples"):
        tokens.write_ecdc(np.zeros((2, 3), dtype=int), 640, "encodec_24khz")


def test_every_cut_of_a_stream_is_refused_by_name():
    codes_QT, samples = random_codes(2, 9)
    data = tokens.write_ecdc(codes_QT, samples, "encodec_24khz")
    for size in range(len(data)):
        with pytest.raises(TokenError, match=r"^s3://b/x\.ecdc: "):
            tokens.read_ecdc(data[:size], "s3://b/x.ecdc")


def test_longer_stream_than_its_header_says_is_refused():
    codes_QT, samples = random_codes(2, 9)
    with pytest.raises(TokenError, match=r"^x\.ecdc: longer than its header says: "):
        tokens.read_ecdc(tokens.write_ecdc(codes_QT, samples, "encodec_24khz") + b"\0", "x.ecdc")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(stream(meta(lm=True), b"\0\0\0"), "lm: true", id="language model"),
        pytest.param(stream(meta(m="encodec_48khz"), b"\0\0\0"), "codec 'encodec_48khz'", id="48 kHz"),
        pytest.param(stream(meta(m="encodec_24khzz"), b"\0\0\0"), "codec 'encodec_24khzz'", id="other name"),
        pytest.param(b"RIFF" + bytes(40), r"not an \.ecdc stream", id="a wav"),
        pytest.param(stream(meta(), b"\0\0\0", version=1), r"not an \.ecdc stream", id="version 1"),
        pytest.param(stream(b"{not json"), "broken", id="no json"),
        pytest.param(stream(b"\xff\xfe"), "broken", id="no utf-8"),
        pytest.param(stream([1, 2]), "broken", id="a list"),
        pytest.param(stream({"m": "encodec_24khz"}), "broken", id="keys missing"),
        pytest.param(stream(meta(al=None)), "broken", id="null length"),
        pytest.param(stream(meta(al=320.5)), "broken", id="half a sample"),
        pytest.param(stream(meta(lm="no")), "broken", id="text for a truth"),
        pytest.param(stream(meta(al=0)), "impossible header: 0 samples", id="no samples"),
        pytest.param(stream(meta(al=-5)), "impossible header", id="negative length"),
        pytest.param(stream(meta(nc=0)), "0 codebooks", id="no codebooks"),
        pytest.param(stream(meta(nc=33)), "33 codebooks", id="too many codebooks"),
        pytest.param(stream(meta(al=10**18)), "truncated", id="huge length"),
        pytest.param(stream(meta(al=float("inf"))), "broken", id="infinite length"),
        pytest.param(stream(b"[" * 100_000), "broken", id="deep json"),
    ],
)
def test_stream_that_is_not_ours_is_refused_by_name(data, reason):
    with pytest.raises(TokenError, match=rf"^folder/x\.ecdc: .*{reason}"):
        tokens.read_ecdc(data, "folder/x.ecdc")


def test_stream_of_other_weights_carries_their_name():
    name = tokens.model_name("0123456789abcdef" * 4, published=False)
    assert name == "encodec_24khz+01234567"
    codes_QT, samples = random_codes(2, 5)
    header, read_QT = tokens.read_ecdc(tokens.write_ecdc(codes_QT, samples, name), "x.ecdc")
    assert header.model_name == name
    assert np.array_equal(read_QT, codes_QT)


def test_only_published_weights_take_the_published_name():
    assert tokens.model_name("ab" * 32, published=True) == "encodec_24khz"


def test_fingerprint_is_a_sha256_of_content_not_of_order():
    weights = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), dtype=np.float32)}
    fingerprint = tokens.codec_fingerprint({"x": 1, "y": 2}, weights)
    assert len(bytes.fromhex(fingerprint)) == 32
    assert tokens.codec_fingerprint({"y": 2, "x": 1}, dict(reversed(weights.items()))) == fingerprint
    strided = {"a": np.arange(12, dtype=np.float32)[::2] / 2, "b": np.asfortranarray(weights["b"])}
    assert tokens.codec_fingerprint({"x": 1, "y": 2}, strided) == fingerprint


def test_fingerprint_changes_with_any_bit_name_shape_type_or_setting():
    weights = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), dtype=np.float32)}
    settings = {"x": 1}
    one_bit = weights["a"].copy()
    one_bit.view(np.uint32)[3] ^= 1
    variants = [
        tokens.codec_fingerprint(settings, weights),
        tokens.codec_fingerprint(settings, weights | {"a": one_bit}),
        tokens.codec_fingerprint(settings, {"c": weights["a"], "b": weights["b"]}),
        tokens.codec_fingerprint(settings, weights | {"b": weights["b"].reshape(3, 2)}),
        tokens.codec_fingerprint(settings, weights | {"a": weights["a"].view(np.int32)}),
        tokens.codec_fingerprint(settings, {"a": weights["a"]}),
        tokens.codec_fingerprint({"x": 2}, weights),
        tokens.codec_fingerprint({}, weights),
    ]
    assert len(set(variants)) == len(variants)
