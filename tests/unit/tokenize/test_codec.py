"""The codec: EnCodec's own codes, and weights that are what they say they are."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import tone

from megascale import tokens
from megascale.errors import StorageError, TokenError
from megascale.tokenize.calibration import calibrate
from megascale.tokenize.codec import Codec, _encodec, load_codec

CLIPS = [tone(2.0, 24_000, 110 * 1.2**i, seed=i) for i in range(15)]  # what fitted_codec was calibrated on


def encodec_codes(codec: Codec, audio_S: np.ndarray, bitrate_kbps: float) -> np.ndarray:
    codec.model.set_target_bandwidth(bitrate_kbps)
    with torch.no_grad():
        ((codes_1QT, scale),) = codec.model.encode(torch.from_numpy(audio_S)[None, None])
    assert scale is None
    return codes_1QT[0].numpy()


def write_checkpoint(folder: Path, blob: bytes, name: str | None = None) -> str:
    path = folder / (name or f"encodec_24khz-{hashlib.sha256(blob).hexdigest()[:8]}.th")
    path.write_bytes(blob)
    return str(path)


def saved(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def checkpoint(fitted_codec, tmp_path_factory):
    """A stand-in in the format of the published file: the whole model's state dict, named after its hash."""
    path = Path(write_checkpoint(tmp_path_factory.mktemp("published"), saved(fitted_codec.model.state_dict())))
    yield path
    path.unlink()  # 93 MB


@pytest.mark.parametrize(("bitrate_kbps", "num_codebooks"), [(1.5, 2), (12.0, 16)])
@pytest.mark.parametrize("samples", [320, 4799, 24_000, 31_337])
def test_codes_are_those_of_encodec(fitted_codec, one_thread, bitrate_kbps, num_codebooks, samples):
    audio_S = tone(2.0, 24_000, 523, seed=samples)[:samples]
    (codes_QT,) = fitted_codec.encode([audio_S], num_codebooks)
    assert codes_QT.dtype == np.int16
    assert codes_QT.shape == (num_codebooks, tokens.num_frames(samples))
    assert np.array_equal(codes_QT, encodec_codes(fitted_codec, audio_S, bitrate_kbps))


def test_clip_length_where_encodecs_own_formula_overshoots_is_encoded(fitted_codec):
    samples = next(n * 320 for n in range(1, 2000) if np.ceil(n * 320 / 24_000 * 75) != n)
    (codes_QT,) = fitted_codec.encode([tone(samples / 24_000, 24_000, 300)], 2)
    assert codes_QT.shape[1] == samples // 320 == tokens.num_frames(samples)


def test_lower_bitrate_is_the_first_codebooks(fitted_codec):
    (many_QT,), (few_QT,) = fitted_codec.encode([CLIPS[3]], 16), fitted_codec.encode([CLIPS[3]], 2)
    assert np.array_equal(many_QT[:2], few_QT)


def test_encoding_twice_gives_the_same_codes(fitted_codec):
    assert np.array_equal(fitted_codec.encode(CLIPS[:2], 16), fitted_codec.encode(CLIPS[:2], 16))


def test_checkpoint_in_the_published_format_gives_the_same_codes(fitted_codec, checkpoint):
    theirs = _encodec().EncodecModel._get_pretrained(checkpoint.name, checkpoint.parent)
    assert set(theirs) == set(fitted_codec.model.state_dict()), "EnCodec's own loader takes the stand-in"
    codec = load_codec(str(checkpoint))
    assert np.array_equal(codec.encode([CLIPS[0]], 16), fitted_codec.encode([CLIPS[0]], 16))
    assert codec.num_codebooks == 32
    assert codec.origin == checkpoint.name
    assert codec.published is False
    assert codec.name == f"encodec_24khz+{codec.fingerprint[:8]}", "only the published weights are `encodec_24khz`"


def test_checkpoint_that_does_not_match_its_name_is_refused(checkpoint, tmp_path):
    for name in ("encodec_24khz-d7cc33bc.th", "encodec_24khz-00000000.th"):
        (tmp_path / name).symlink_to(checkpoint)
        with pytest.raises(TokenError, match=f"{name}: its sha256 begins with {checkpoint.stem[-8:]}, its name says "):
            load_codec(str(tmp_path / name))


def test_truncated_checkpoint_is_refused_by_its_hash_and_by_its_content(checkpoint, tmp_path):
    half = checkpoint.read_bytes()[: checkpoint.stat().st_size // 2]
    with pytest.raises(TokenError, match="its sha256 begins with"):
        load_codec(write_checkpoint(tmp_path, half, checkpoint.name))
    url = write_checkpoint(tmp_path, half)
    with pytest.raises(TokenError, match=f"^{url}: not an EnCodec 24 kHz state dict: [^\n]*$"):
        load_codec(url)
    for path in tmp_path.iterdir():
        path.unlink()


class Bomb:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_inside_a_checkpoint_is_never_run(tmp_path):
    trace = tmp_path / "code-was-run"
    pickle.loads(pickle.dumps(Bomb(trace)))
    trace.rmdir()  # raises unless the bomb works where unpickling is allowed
    for blob in (saved({"a": Bomb(trace)}), pickle.dumps({"a": Bomb(trace)})):
        url = write_checkpoint(tmp_path, blob)
        with pytest.raises(TokenError, match=f"^{url}: not an EnCodec 24 kHz state dict"):
            load_codec(url)
        assert not trace.exists()


@pytest.mark.parametrize(
    "thing", [torch.zeros(3), {"encoder": torch.zeros(3)}, [1]], ids=["tensor", "other keys", "list"]
)
def test_checkpoint_of_something_else_is_refused(tmp_path, thing):
    url = write_checkpoint(tmp_path, saved(thing))
    with pytest.raises(TokenError, match=f"^{url}: not an EnCodec 24 kHz state dict"):
        load_codec(url)


@pytest.mark.parametrize("name", ["model.th", "encodec_48khz-7e698e3e.th", "encodec_24khz-xyz.th", "encodec_24khz.th"])
def test_file_that_is_not_named_like_a_codec_is_refused(tmp_path, name):
    with pytest.raises(
        TokenError, match=rf"{name}: codec\.weights is named like encodec_24khz-d7cc33bc\.th or ends in"
    ):
        load_codec(write_checkpoint(tmp_path, b"x", name))


def test_missing_weights_are_named(tmp_path):
    for name in ("encodec_24khz-d7cc33bc.th", "codec.safetensors"):
        with pytest.raises(StorageError, match=f"{name}: no such file"):
            load_codec(str(tmp_path / name))


@pytest.fixture(scope="module")
def small_codec():
    """Two codebooks fitted on the least audio; 4 s."""
    return calibrate(CLIPS[:2], num_codebooks=2, seed=0)


def test_saved_codec_keeps_fingerprint_name_and_codes(fitted_codec, tmp_path):
    url = str(tmp_path / "codec.safetensors")
    Path(url).write_bytes(fitted_codec.to_bytes())
    codec = load_codec(url)
    assert (codec.fingerprint, codec.name, codec.origin) == (
        fitted_codec.fingerprint,
        fitted_codec.name,
        fitted_codec.origin,
    )
    assert codec.num_codebooks == 16
    assert np.array_equal(codec.encode([CLIPS[1]], 16), fitted_codec.encode([CLIPS[1]], 16))
    assert codec.to_bytes() == fitted_codec.to_bytes()


@pytest.mark.parametrize("place", [0.25, 0.5, 0.75, 1.0])
def test_changed_byte_in_a_saved_codec_is_refused(small_codec, tmp_path, place):
    data = bytearray(small_codec.to_bytes())
    data[min(len(data) - 1, round(place * len(data)))] ^= 1
    path = tmp_path / "codec.safetensors"
    path.write_bytes(data)
    with pytest.raises(TokenError, match=f"^{path}: its weights do not match its fingerprint; the file was changed$"):
        load_codec(str(path))


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_truncated_saved_codec_is_refused(small_codec, tmp_path, size):
    path = tmp_path / "codec.safetensors"
    path.write_bytes(small_codec.to_bytes()[:size])
    with pytest.raises(TokenError, match=f"^{path}: not a codec this package saved: "):
        load_codec(str(path))


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"codec": "not json"},
        {"codec": "[]"},
        {"codec": json.dumps({"num_codebooks": 2, "origin": "x"})},
        {"codec": json.dumps({"num_codebooks": "2", "origin": "x", "fingerprint": "y"})},
        {"codec": json.dumps({"num_codebooks": 40, "origin": "x", "fingerprint": "y"})},
        {"codec": json.dumps({"num_codebooks": 3, "origin": "x", "fingerprint": "y"})},
    ],
    ids=["none", "other", "no json", "a list", "no fingerprint", "text for a number", "40 codebooks", "one missing"],
)
def test_safetensors_of_something_else_is_refused(small_codec, tmp_path, metadata):
    path = tmp_path / "codec.safetensors"
    path.write_bytes(safetensors.torch.save(small_codec.state(), metadata))
    with pytest.raises(TokenError, match=f"^{path}: "):
        load_codec(str(path))


WITHOUT_TORCHAUDIO = """
import hashlib, importlib.util, sys
import numpy as np
from megascale.tokenize.codec import _encodec, load_codec
encodec = _encodec()
codec = load_codec(sys.argv[1])
codes = np.stack(codec.encode(np.load(sys.argv[2]), 2))
print(hashlib.sha256(codes.tobytes()).hexdigest())
import torchaudio
for call in (torchaudio.load, torchaudio.transforms.Spectrogram, lambda: encodec.utils.convert_audio(*ARGS)):
    try:
        call()
    except ImportError as failure:
        print(type(failure).__name__, failure)
""".replace("*ARGS", "__import__('torch').zeros(1, 8000), 8000, 24000, 1")


def run_without_torchaudio(folder: Path, code: str, *arguments: str) -> str:
    """Run code where importing torchaudio dies as a CUDA build does beside a CPU torch."""
    broken = folder / "broken"
    broken.mkdir()
    (broken / "torchaudio.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')\n")
    environment = os.environ | {"PYTHONPATH": str(broken)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_codec_works_where_torchaudio_cannot_be_loaded(small_codec, tmp_path):
    (tmp_path / "codec.safetensors").write_bytes(small_codec.to_bytes())
    audio_BS = np.stack(CLIPS[:2])
    np.save(tmp_path / "audio.npy", audio_BS)
    out = run_without_torchaudio(
        tmp_path, WITHOUT_TORCHAUDIO, str(tmp_path / "codec.safetensors"), str(tmp_path / "audio.npy")
    ).splitlines()
    assert out[0] == hashlib.sha256(np.stack(small_codec.encode(audio_BS, 2)).tobytes()).hexdigest()
    reason = "ImportError torchaudio cannot be loaded beside this torch: libc10_cuda.so: cannot open shared object file"
    assert out[1:] == [reason] * 3


def test_placeholder_for_torchaudio_can_be_asked_for_by_other_libraries(tmp_path):
    # transformers, datasets and others ask importlib whether torchaudio is there
    code = "import importlib.util; from megascale.tokenize.codec import _encodec; _encodec(); "
    code += "importlib.util.find_spec('torchaudio'); importlib.util.find_spec('torchaudio.transforms'); print('fine')"
    assert run_without_torchaudio(tmp_path, code) == "fine\n"
