"""`launch/predict.py`: what is printed where, how it ends, and that no codec is needed."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
from classifiers import CLASSES, draw_codes, write_classifier, write_foreign_stream, write_stream
from support import tone, write_pretrained, write_token_folder

from megascale import cli
from megascale.downstream.predict import Predictor

ROOT = Path(__file__).parents[2]
Call = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Run the command in this process; return exit code, the lines of stdout, and stderr."""

    def run(*arguments: object) -> tuple[int, list[dict[str, Any]], str]:
        code = cli.predict([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A fine-tuned run."""
    write_classifier(tmp_path / "run" / "model")
    return tmp_path / "run"


def refused(call: Call, *arguments: object) -> str:
    """Run the command on nothing but bad input; return its one line."""
    code, lines, err = call(*arguments)
    assert (code, lines, err.count("\n")) == (2, [], 1)
    return err


def given(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


# ------------------------------------------------------------------------------------------------------------ labels


def test_a_line_says_source_label_probabilities_of_all_classes_and_length(call, model, tmp_path):
    codes_QT = draw_codes(90)
    path = write_stream(tmp_path / "clip.ecdc", codes_QT)
    code, (line,), err = call(model, path)
    ((_, probabilities_C),) = Predictor(str(model))([codes_QT], None)
    assert code == 0
    assert list(line) == ["source", "label", "probabilities", "frames", "seconds"]
    assert (line["source"], line["frames"], line["seconds"]) == (str(path), 90, 1.2)
    assert line["probabilities"] == {name: round(float(p), 6) for name, p in zip(CLASSES, probabilities_C, strict=True)}
    assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
    assert err == "1 clips labelled on stdout; next: with --embeddings OUT.parquet, what the labels were made of\n"


def test_inputs_of_all_kinds_are_answered_for_in_their_order(call, model, tmp_path):
    write_token_folder(tmp_path / "tokens", 10, num_codebooks=16, frames=[20, 30] * 5, clips_per_shard=8)
    for i, frames in enumerate((40, 20, 40, 25)):
        write_stream(tmp_path / "loose" / f"{i}.ecdc", draw_codes(frames, seed=i))
    code, lines, _ = call(
        model, tmp_path / "loose" / "3.ecdc", tmp_path / "tokens", tmp_path / "loose", "--batch", 2, "--device", "cpu"
    )
    assert code == 0
    told = [(Path(line["source"]).name, line.get("key"), line["frames"]) for line in lines]
    shards = [(f"tokens-{i // 8:06d}.tar", f"clip-{i:04d}", (20, 30)[i % 2]) for i in range(10)]
    loose = [(f"{i}.ecdc", None, frames) for i, frames in enumerate((40, 20, 40, 25))]
    assert told == [loose[3], *shards, *loose]
    assert lines[0]["probabilities"] == lines[-1]["probabilities"]


def test_labels_of_a_model_of_several_are_those_of_half_and_more(call, tmp_path):
    write_classifier(tmp_path / "model", told={"task_kind": "multi"})
    write_token_folder(tmp_path / "tokens", 20, frames=40)
    code, lines, _ = call(tmp_path / "model", tmp_path / "tokens")
    assert code == 0 and len(lines) == 20
    for line in lines:
        assert list(line) == ["source", "key", "labels", "probabilities", "frames", "seconds"]
        assert line["labels"] == [name for name in CLASSES if line["probabilities"][name] >= 0.5]
    assert {len(line["labels"]) for line in lines} >= {1, 2}, "one, and several"


def test_windows_are_averaged_unless_a_clip_is_taken_whole(call, model, tmp_path):
    codes_QT = draw_codes(800)
    path = write_stream(tmp_path / "long.ecdc", codes_QT)
    predictor = Predictor(str(model))
    found = {}
    for name, options, window in [
        ("models", [], 750), ("whole", ["--window", "whole"], None), ("seconds", ["--window=2"], 150),
    ]:  # fmt: skip
        code, (line,), _ = call(model, path, *options)
        ((_, probabilities_C),) = predictor([codes_QT], window)
        found[name] = list(line["probabilities"].values())
        assert code == 0 and line["frames"] == 800
        assert found[name] == [round(float(p), 6) for p in probabilities_C]
    assert len({tuple(shares) for shares in found.values()}) == 3


# --------------------------------------------------------------------------------------------------------- bad input


def test_a_bad_clip_is_a_line_in_its_place_and_the_job_ends_with_3(call, model, tmp_path):
    good = [write_stream(tmp_path / f"{i}.ecdc", draw_codes(20, seed=i)) for i in range(2)]
    bad = write_foreign_stream(tmp_path / "lm.ecdc", lm=True)
    code, lines, err = call(model, bad, good[0], tmp_path / "gone.ecdc", good[1])
    assert code == 3
    assert [line["source"] for line in lines] == list(map(str, [bad, good[0], tmp_path / "gone.ecdc", good[1]]))
    assert [set(line) & {"error", "label"} for line in lines] == [{"error"}, {"label"}] * 2
    assert "language model" in lines[0]["error"] and "no such file" in lines[2]["error"]
    assert err.startswith("2 clips labelled on stdout; 2 could not be read")


def test_if_every_input_is_bad_there_is_one_line_and_no_other(call, model, tmp_path):
    bad = write_foreign_stream(tmp_path / "lm.ecdc", lm=True)
    assert refused(call, model, bad).startswith(f"TokenError: {bad}: entropy-coded by EnCodec's language model")
    err = refused(call, model, bad, tmp_path / "gone.ecdc", "--embeddings", tmp_path / "out.npz")
    assert err.startswith(f"DataError: none of 2 clips could be answered for; the first: {bad}: entropy-coded")
    assert not (tmp_path / "out.npz").exists()
    write_token_folder(tmp_path / "other", 4, fingerprint="cd" * 32)
    assert "made by codec cdcdcdcd" in refused(call, model, tmp_path / "other")


def test_a_bad_model_or_option_is_one_line(call, model, tmp_path):
    write_pretrained(tmp_path / "pretrained", 2)
    clip = write_stream(tmp_path / "clip.ecdc", draw_codes(20))
    (tmp_path / "empty").mkdir()
    for arguments, line in [
        ([tmp_path / "gone", clip], f"CheckpointError: {tmp_path / 'gone'}: no checkpoint here"),
        ([tmp_path / "empty", clip], f"CheckpointError: {tmp_path / 'empty'}: no checkpoint here"),
        ([tmp_path / "pretrained", clip], f"CheckpointError: {tmp_path / 'pretrained'}: a pretrained encoder, which knows"),
        ([model], "ConfigError: predict: the following arguments are required: INPUT; see --help"),
        ([model, clip, "--windo", "x"], "ConfigError: predict: argument --window: 'x' is no number above 0; see --help"),
        ([model, clip, "--window", "nan"], "ConfigError: predict: argument --window: 'nan' is no number above 0"),
        ([model, clip, "--max-seconds", "-1"], "ConfigError: predict: argument --max-seconds: '-1' is no number above 0"),
        ([model, clip, "--batch", "0"], "ConfigError: predict: argument --batch: '0' is no number of 1 or more"),
        ([model, clip, "-"], "ConfigError: predict: `-` stands alone"),
        ([model, clip, "--embeddings", "x.csv"], "ConfigError: --embeddings=x.csv: ends in neither .parquet nor .npz"),
        (["s3://me:secret@b/run", clip], "ConfigError: model: has credentials in it"),
    ]:  # fmt: skip
        err = refused(call, *arguments)
        assert err.startswith(line) and "secret" not in err


def test_a_long_clip_is_bad_where_max_seconds_says_so(call, model, tmp_path):
    clip = write_stream(tmp_path / "clip.ecdc", draw_codes(160))
    assert f"{clip}: 2 s, --max-seconds=2" in refused(call, model, clip, "--max-seconds", 2)
    assert call(model, clip, "--max-seconds", 3)[0] == 0


def test_a_path_that_is_no_utf8_is_answered_for_in_plain_json(call, model, tmp_path):
    path = write_stream(tmp_path / os.fsdecode(b"caf\xe9.ecdc"), draw_codes(20))
    code, (line,), _ = call(model, path)
    assert code == 0 and Path(line["source"]).name == "caf\\udce9.ecdc"


# ------------------------------------------------------------------------------------------------------------- stdin


def test_each_line_of_stdin_is_answered_and_bad_ones_end_with_3(call, model, tmp_path, monkeypatch):
    clip = write_stream(tmp_path / os.fsdecode(b"caf\xe9.ecdc"), draw_codes(20))
    write_token_folder(tmp_path / "tokens", 3)
    lines_in = [
        os.fsencode(clip),
        b"",
        b"  ",
        b"gone.ecdc\r",
        os.fsencode(tmp_path / "tokens"),
        b"s3://a:secret@b/c.ecdc",
    ]
    given(monkeypatch, b"\n".join(lines_in))
    code, lines, err = call(model, "-")
    assert code == 3
    assert ["error" in line for line in lines] == [False, True, False, False, False, True]
    assert [line.get("key") for line in lines[2:5]] == ["clip-0000", "clip-0001", "clip-0002"]
    assert lines[1] == {"source": "gone.ecdc", "error": "gone.ecdc: no such file"}
    assert "credentials" in lines[5]["error"] and "secret" not in json.dumps(lines) + err


def test_stream_of_bad_lines_alone_answers_for_each_and_ends_with_2(call, model, tmp_path, monkeypatch):
    given(monkeypatch, b"gone.ecdc\n")
    code, (line,), err = call(model, "-")
    assert (code, line["source"]) == (2, "gone.ecdc")
    assert err == "StorageError: gone.ecdc: no such file\n"
    given(monkeypatch, b"gone.ecdc\nlost.ecdc\n")
    code, lines, err = call(model, "-", "--embeddings", tmp_path / "out.npz")
    assert (code, [line["source"] for line in lines]) == (2, ["gone.ecdc", "lost.ecdc"])
    assert err == "DataError: none of 2 clips could be answered for; the first: gone.ecdc: no such file\n"
    assert not (tmp_path / "out.npz").exists()
    given(monkeypatch, b"")
    assert call(model, "-")[:2] == (0, [])


# -------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("ending", ["npz", "parquet"])
@pytest.mark.parametrize("kind", ["classifier", "pretrained"])
def test_embeddings_are_the_models_row_by_row(call, model, tmp_path, ending, kind):
    write_pretrained(tmp_path / "pretrained", 2)
    place = model if kind == "classifier" else tmp_path / "pretrained"
    made = write_token_folder(tmp_path / "tokens", 5, frames=[20, 30, 20, 25, 20])
    bad, clip = tmp_path / "gone.ecdc", write_stream(tmp_path / "clip.ecdc", draw_codes(40))
    out = tmp_path / "new" / f"out.{ending}"
    code, lines, err = call(place, tmp_path / "tokens", bad, clip, "--embeddings", out)
    assert code == 3
    assert [set(line) & {"label", "error"} for line in lines if "error" not in line] == [
        {"label"} if kind == "classifier" else set()
    ] * 6
    told = "labelled" if kind == "classifier" else "listed"
    assert f"6 clips {told} on stdout, their embeddings -> {out}; next: " in err and "1 could not be read" in err
    answers = Predictor(str(place))([*(codes_QT.astype(np.int16) for codes_QT in made), draw_codes(40)], None)
    if ending == "npz":
        found = dict(np.load(out))  # nothing in it is pickled
        assert str(found["model"]) == str(place) and str(found["codec"]) == "ab" * 32
        vectors_ND, sources, keys = found["embedding"], found["source"].tolist(), found["key"].tolist()
        assert found["frames"].tolist() == [20, 30, 20, 25, 20, 40]
    else:
        table = pyarrow.parquet.read_table(out)
        assert table.schema.metadata[b"model"] == str(place).encode()
        assert table["seconds"].to_pylist() == [pytest.approx(n / 75) for n in (20, 30, 20, 25, 20, 40)]
        vectors_ND, sources = np.array(table["embedding"].to_pylist(), dtype=np.float32), table["source"].to_pylist()
        keys = [key or "" for key in table["key"].to_pylist()]
    assert np.array_equal(vectors_ND, np.stack([answer.embedding_D for answer in answers]))
    assert sources == [str(tmp_path / "tokens" / "tokens-000000.tar")] * 5 + [str(clip)]
    assert keys == [*(f"clip-{i:04d}" for i in range(5)), ""]


def test_embeddings_that_cannot_be_written_end_with_2_before_a_clip_is_read(call, model, tmp_path):
    clip = write_stream(tmp_path / "clip.ecdc", draw_codes(20))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out.npz"
    assert refused(call, model, clip, "--embeddings", out).startswith(f"StorageError: {out}: cannot write: ")


# --------------------------------------------------------------------------------------------------------- raw audio


def test_raw_audio_is_tokenised_by_the_models_codec_and_no_other(call, tmp_path, fitted_codec):
    write_classifier(tmp_path / "model", 2, fitted_codec.fingerprint)
    (tmp_path / "codec.safetensors").write_bytes(fitted_codec.to_bytes())
    audio_S = tone(2.0, 24_000, 440.0)
    soundfile.write(tmp_path / "sound.wav", audio_S, 24_000, subtype="FLOAT")
    (codes_QT,) = fitted_codec.encode([audio_S], 16)
    write_stream(tmp_path / "sound.ecdc", codes_QT, fitted_codec.name)
    codec = ["--codec", tmp_path / "codec.safetensors"]
    code, lines, _ = call(tmp_path / "model", tmp_path / "sound.wav", tmp_path / "sound.ecdc", *codec)
    assert code == 0
    assert [line.pop("source") for line in lines] == [f"{tmp_path}/sound.wav", f"{tmp_path}/sound.ecdc"]
    assert lines[0] == lines[1] and lines[0]["seconds"] == 2.0

    (tmp_path / "text.wav").write_text("no audio")
    for name, options, message in [
        ("sound.wav", [], "sound.wav: raw audio needs the model's codec: --codec URL of encodec_24khz+"),
        ("text.wav", codec, "AudioError: "),
        ("sound.wav", [*codec, "--max-seconds", 1.5], "sound.wav: 2 s, --max-seconds=1.5"),
        ("sound.wav", ["--codec", tmp_path / "gone.safetensors"], "gone.safetensors: no such file"),
    ]:
        assert message in refused(call, tmp_path / "model", tmp_path / name, *options)
    write_classifier(tmp_path / "other")
    err = refused(call, tmp_path / "other", tmp_path / "sound.wav", *codec)
    assert (
        f"codec.safetensors: codec {fitted_codec.fingerprint[:8]}, the model was trained on tokens of codec aba" in err
    )


_WITHOUT_CODEC = """
import sys
from megascale import cli
code = cli.predict(sys.argv[1:])
loaded = [name for name in ("encodec", "torchaudio", "ray", "deepspeed", "soundfile", "sklearn") if name in sys.modules]
sys.exit(f"loaded: {loaded}" if loaded else code)
"""


def test_streams_and_shards_need_neither_codec_nor_ray_nor_deepspeed(model, tmp_path):
    clip = write_stream(tmp_path / "clip.ecdc", draw_codes(20))
    write_token_folder(tmp_path / "tokens", 3)
    command = [sys.executable, "-c", _WITHOUT_CODEC, str(model), str(clip), str(tmp_path / "tokens")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("4 clips labelled on stdout")
    assert len(done.stdout.splitlines()) == 4


def test_full_disk_behind_stdout_is_one_line(model, tmp_path):
    write_token_folder(tmp_path / "tokens", 3)
    code = "import sys; from megascale import cli; sys.exit(cli.predict(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "tokens")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr.startswith("StorageError: stdout: cannot write: No space left on device after ")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
