"""`.ecdc` in, label out: what the model is given, which files can be read, and that a clip's answer is its own."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import save
from classifiers import (
    FINGERPRINT,
    NAME,
    SHAPE,
    draw_codes,
    write_classifier,
    write_foreign_stream,
    write_stream,
)
from support import write_pretrained, write_token_folder

from megascale import storage
from megascale.data.index import CodecFacts
from megascale.downstream.inputs import Clip, Failure, Inputs, Source
from megascale.downstream.predict import Predictor, _starts
from megascale.errors import CheckpointError, MegascaleError
from megascale.export import AudioClassifier
from megascale.train import checkpoint

CODEC = CodecFacts(name=NAME, fingerprint=FINGERPRINT, origin="test", num_codebooks=16)


def no_audio(url: str) -> tuple[np.ndarray, int]:
    raise AssertionError(f"{url} is no audio")


def inputs(num_codebooks: int = 2, most_seconds: float = 100.0) -> Inputs:
    return Inputs(CODEC, num_codebooks, no_audio, (".wav",), most_seconds)


def read(url: object, num_codebooks: int = 2) -> list[Clip | Failure]:
    found = inputs(num_codebooks)
    return list(found.read(found.find(str(url))))


def clips(url: object, num_codebooks: int = 2) -> list[Clip]:
    got = read(url, num_codebooks)
    assert all(isinstance(item, Clip) for item in got), got
    return got  # type: ignore[return-value]


def error(url: object, num_codebooks: int = 2) -> str:
    """The one error that reading a URL ends with."""
    (got,) = read(url, num_codebooks)
    assert isinstance(got, Failure)
    return str(got.error)


# --------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(("num_codebooks", "pooling"), [(2, "mean"), (2, "mean_std"), (16, "mean")])
def test_answers_are_those_of_the_fine_tuned_model_bit_by_bit(tmp_path, one_thread, num_codebooks, pooling):
    model = write_classifier(tmp_path / "model", num_codebooks, pooling=pooling)
    codes_QT = draw_codes(90, num_codebooks)
    codes_1TQ = torch.from_numpy(codes_QT.T.astype(np.int64))[None]
    with torch.inference_mode():
        logits_1C, x_1TD = model(codes_1TQ), model.global_encoder(codes_1TQ)
    ((embedding_D, probabilities_C),) = Predictor(str(tmp_path / "model"))([codes_QT], None)
    assert np.array_equal(embedding_D, x_1TD.mean(dim=1)[0].numpy())
    assert np.array_equal(probabilities_C, logits_1C.softmax(dim=-1)[0].numpy())
    assert np.ptp(probabilities_C) > 0.05, "first weights would give a third to each"


def test_a_model_that_does_not_tell_its_pooling_takes_the_mean(tmp_path):
    write_classifier(tmp_path / "told")
    shutil.copytree(tmp_path / "told", tmp_path / "older")
    config = json.loads((tmp_path / "older" / "config.json").read_text())
    del config["pooling"]
    (tmp_path / "older" / "config.json").write_text(json.dumps(config))
    codes_QT = draw_codes(90)
    (told,), (older,) = (Predictor(str(tmp_path / name))([codes_QT], None) for name in ("told", "older"))
    assert np.array_equal(told.probabilities_C, older.probabilities_C)
    codes_1TQ = torch.from_numpy(codes_QT.T.astype(np.int64))[None]
    read = [AudioClassifier.from_pretrained(tmp_path / name)(codes_1TQ) for name in ("told", "older")]
    assert torch.equal(*read)


def test_labels_that_can_come_together_have_chances_of_their_own(tmp_path):
    model = write_classifier(tmp_path / "model", 2, told={"task_kind": "multi"})
    codes_QT = draw_codes(90, 2)
    with torch.inference_mode():
        logits_1C = model(torch.from_numpy(codes_QT.T.astype(np.int64))[None])
    ((_, chances_C),) = Predictor(str(tmp_path / "model"))([codes_QT], None)
    np.testing.assert_allclose(chances_C, logits_1C.sigmoid()[0].numpy(), rtol=1e-5)  # threads sum in another order
    assert abs(chances_C.sum() - 1) > 0.1


@pytest.mark.parametrize("frames", [1, 2, 31, 32, 75, 750])
@pytest.mark.parametrize(("num_codebooks", "pooling"), [(2, "mean"), (2, "mean_std"), (16, "mean")])
def test_an_answer_does_not_depend_on_a_clips_neighbours_bit_by_bit(
    tmp_path, one_thread, frames, num_codebooks, pooling
):
    write_classifier(tmp_path / "model", num_codebooks, pooling=pooling)
    given = [draw_codes(length, num_codebooks, seed) for seed, length in enumerate([frames, 40, frames, 90, frames])]
    predictor = Predictor(str(tmp_path / "model"), batch=8)
    alone = [predictor([codes_QT], None)[0] for codes_QT in given]
    together = predictor(given, None)
    backwards = Predictor(str(tmp_path / "model"), batch=2)(given[::-1], None)[::-1]
    for one, *others in zip(alone, together, backwards, strict=True):
        for other in others:
            assert np.array_equal(one.embedding_D, other.embedding_D)
            assert np.array_equal(one.probabilities_C, other.probabilities_C)
    assert not np.array_equal(alone[0].embedding_D, alone[2].embedding_D)


def test_a_long_clip_is_the_mean_over_windows_that_cover_it(tmp_path):
    write_classifier(tmp_path / "model")
    predictor = Predictor(str(tmp_path / "model"))
    codes_QT = draw_codes(100)
    (whole,) = predictor([codes_QT], None)
    (answer,) = predictor([codes_QT], 40)
    parts = predictor([codes_QT[:, start : start + 40] for start in (0, 30, 60)], None)
    for name in ("embedding_D", "probabilities_C"):
        expected = np.mean([getattr(part, name) for part in parts], axis=0)
        # batches of other sizes may round otherwise
        np.testing.assert_allclose(getattr(answer, name), expected, rtol=0, atol=1e-5)
        assert not np.allclose(getattr(answer, name), getattr(whole, name), rtol=0, atol=1e-3)
    assert np.array_equal(predictor([codes_QT], 100)[0].embedding_D, whole.embedding_D)


@pytest.mark.parametrize(("frames", "window"), [(1, 750), (750, 750), (751, 750), (1500, 750), (2250, 700), (100, 1)])
def test_windows_are_the_fewest_that_cover_every_frame(frames, window):
    starts = _starts(frames, window)
    assert len(starts) == -(-frames // window)
    length = min(frames, window)
    assert set(range(frames)) == {frame for start in starts for frame in range(start, start + length)}
    assert starts == sorted(set(starts)) and starts[-1] + length == frames


def test_the_window_is_the_models_own_clip_length_or_the_papers(tmp_path):
    write_classifier(tmp_path / "silent")
    write_classifier(tmp_path / "told", told={"clip_frames": 300})
    assert Predictor(str(tmp_path / "silent")).facts.clip_frames == 750
    assert Predictor(str(tmp_path / "told")).facts.clip_frames == 300


def test_a_pretrained_encoder_has_embeddings_and_no_classes(tmp_path):
    write_pretrained(tmp_path / "model", 2)
    predictor = Predictor(str(tmp_path / "model"))
    ((embedding_D, probabilities_C),) = predictor([draw_codes(20)], None)
    assert predictor.classes is None and probabilities_C is None
    assert embedding_D.shape == (32,)


@pytest.fixture
def store() -> Iterator[str]:
    """An empty store in memory."""
    yield "memory://predict"
    storage.delete("memory://predict")


@pytest.mark.parametrize(
    ("run", "places"),
    [
        ("finetuned", ["", "/", "/model"]),
        ("pretrained", ["", "/checkpoints/step-00000001", "/checkpoints/step-00000001/model"]),
    ],
)
def test_model_is_a_run_its_model_or_a_pretraining_run_or_checkpoint_at_any_url(tmp_path, store, run, places):
    if run == "finetuned":
        write_classifier(tmp_path / run / "model")
    else:
        step = tmp_path / run / "checkpoints" / "step-00000001"
        write_pretrained(step / "model", 2)
        checkpoint.commit(step, 1, 16, 1, 2.0)
    for path in (tmp_path / run).rglob("*"):
        if path.is_file():
            storage.publish_bytes(f"{store}/{path.relative_to(tmp_path)}", path.read_bytes())
    urls = [f"{base}/{run}{place}" for place in places for base in (tmp_path, f"file://{tmp_path}", store)]
    answers = [Predictor(url)([draw_codes(20)], None)[0] for url in urls]
    assert all(np.array_equal(answer.embedding_D, answers[0].embedding_D) for answer in answers)


def test_what_is_no_model_is_told_by_name(tmp_path):
    for name, more, message in [
        (
            "codebooks",
            {"num_codebooks": 3},
            "its weights are not those of its config.json: model.width=64 must be a mul",
        ),
        ("classes", {"classes": ["a", "b"]}, "its weights are not those of its config.json: size mismatch for bias"),
        ("shape", {"model": {**SHAPE.model_dump(), "layers": 3}}, "its weights are not those of its config.json: "),
        ("one", {"classes": ["a"]}, "config.json: classes: "),
        ("codec", {"codec": {"name": "x"}}, "config.json: codec.fingerprint: "),
    ]:
        write_classifier(tmp_path / name, told=more)
        with pytest.raises(CheckpointError, match=f"^{re.escape(f'{tmp_path / name}: {message}')}") as raised:
            Predictor(str(tmp_path / name))
        assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        Predictor(str(tmp_path / "nowhere"))
    folder = save(tmp_path / "run" / "checkpoints", 3)
    (folder / "manifest.json").unlink()
    for place in (tmp_path / "run", folder):
        with pytest.raises(CheckpointError, match=r"without a committed checkpoint|no manifest"):
            Predictor(str(place))


def test_weights_that_diverged_are_told_and_no_answer_is_given(tmp_path):
    model = write_classifier(tmp_path / "model")
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    weights["global_encoder.norm.weight"][3] = float("nan")
    checkpoint.write_model(tmp_path / "model", weights, checkpoint.read_facts(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="model: puts out what is no finite number"):
        Predictor(str(tmp_path / "model"))([draw_codes(20)], None)


# --------------------------------------------------------------------------------------------------------- the files


def test_a_stream_of_more_codebooks_is_read_to_the_models(tmp_path):
    """RVQ is nested: a clip tokenised at 12 kbps answers a 1.5 kbps model as one tokenised at 1.5 does."""
    codes_QT = draw_codes(50, 16)
    write_stream(tmp_path / "many.ecdc", codes_QT)
    write_stream(tmp_path / "few.ecdc", codes_QT[:2])
    (many,), (few,) = clips(tmp_path / "many.ecdc"), clips(tmp_path / "few.ecdc")
    assert np.array_equal(many.codes_QT, codes_QT[:2]) and np.array_equal(few.codes_QT, codes_QT[:2])
    assert (many.key, many.seconds, many.source) == (None, pytest.approx(50 / 75), str(tmp_path / "many.ecdc"))


def test_bad_streams_are_told_in_one_line_by_name(tmp_path):
    codes_QT = draw_codes(50)
    good = write_stream(tmp_path / "good.ecdc", codes_QT).read_bytes()
    cases = {
        "lm": (write_foreign_stream(tmp_path / "lm.ecdc", lm=True), "entropy-coded by EnCodec's language model"),
        "48": (write_foreign_stream(tmp_path / "48.ecdc", m="encodec_48khz"), "codec 'encodec_48khz'; only encodec_24khz"),
        "other": (
            write_stream(tmp_path / "other.ecdc", codes_QT, "encodec_24khz+cdcdcdcd"),
            "codes of encodec_24khz+cdcdcdcd, the model was trained on codes of encodec_24khz+abababab",
        ),
        "published": (write_stream(tmp_path / "p.ecdc", codes_QT, "encodec_24khz"), "codes of encodec_24khz, the model"),
        "few": (write_stream(tmp_path / "few.ecdc", codes_QT[:1]), "holds 1 codebooks, 2 were asked for"),
        "long": (write_stream(tmp_path / "long.ecdc", draw_codes(7600)), "101 s, --max-seconds=100"),
    }  # fmt: skip
    for name, size, message in [
        ("cut", -1, "truncated: "),
        ("head", 12, "truncated in its header"),
        ("none", 0, "0 byt"),
    ]:
        path = tmp_path / f"{name}.ecdc"
        path.write_bytes(good[: len(good) + size if size < 0 else size])
        cases[name] = path, message
    (tmp_path / "text.ecdc").write_text("no stream at all, but a text")
    (tmp_path / "more.ecdc").write_bytes(good + bytes(3))
    cases["text"] = tmp_path / "text.ecdc", "not an .ecdc stream"
    cases["more"] = tmp_path / "more.ecdc", "longer than its header says"
    cases["gone"] = tmp_path / "gone.ecdc", "no such file"
    for path, message in cases.values():
        told = error(path)
        assert told.startswith(f"{path}: ") and message in told and "\n" not in told


def test_a_token_folder_and_its_shards_alone_give_the_same_clips(tmp_path):
    made = write_token_folder(tmp_path / "tokens", 12, num_codebooks=16, frames=range(30, 42), clips_per_shard=8)
    expected = [(f"clip-{i:04d}", (30 + i) / 75) for i in range(12)]
    shards = sorted((tmp_path / "tokens").glob("*.tar"))
    (tmp_path / "bare").mkdir()
    for shard in shards:
        (tmp_path / "bare" / shard.name).write_bytes(shard.read_bytes())
    for places in ([tmp_path / "tokens"], shards, [tmp_path / "bare"]):
        got = [clip for place in places for clip in clips(place)]
        assert [(clip.key, clip.seconds) for clip in got] == [(key, pytest.approx(n)) for key, n in expected]
        assert all(np.array_equal(clip.codes_QT, codes_QT[:2]) for clip, codes_QT in zip(got, made, strict=True))
        assert [Path(clip.source).name for clip in got] == [shards[0].name] * 8 + [shards[1].name] * 4


def test_number_of_clips_is_known_from_a_manifest_and_else_when_a_shard_is_read(tmp_path):
    write_token_folder(tmp_path / "tokens", 12, clips_per_shard=8)
    told = inputs()
    found = told.find(str(tmp_path / "tokens"))
    assert told.num_clips == 12
    (tmp_path / "tokens" / "manifest.json").unlink()
    learned = inputs()
    bare = learned.find(str(tmp_path / "tokens"))
    assert learned.num_clips == 2
    (tmp_path / "tokens" / "tokens-000001.tar").unlink()
    for each, items, left in ((told, found, 9), (learned, bare, 9)):
        assert len(list(each.read(items))) == left
        assert each.num_clips == left  # 8, and the one line that says that a shard is gone


def test_bad_shards_are_told_by_name_and_what_is_whole_is_read(tmp_path):
    write_token_folder(tmp_path / "tokens", 16, clips_per_shard=8)
    tar = tmp_path / "tokens" / "tokens-000000.tar"
    whole = tar.read_bytes()
    place = whole.index(b"ECDC") + 60
    tar.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    bad, *good = read(tmp_path / "tokens")
    assert f"{tar}: its sha256 is not the one that was committed" in str(bad.error) and len(good) == 8
    assert "its sha256 is not the one that was committed" in error(tar)
    for data, message in [(whole[:700], "not a tar, or a cut one"), (b"no tar", "not a tar"), (b"", "not a tar")]:
        alone = tmp_path / "alone.tar"
        alone.write_bytes(data)
        assert error(alone).startswith(f"{alone}: {message}")
    alone.write_bytes(whole.replace(b"ECDC", b"ECDX", 1))  # and no index beside it, which would know
    bad, *good = read(alone)
    assert (bad.key, len(good)) == ("clip-0000", 7)
    assert str(bad.error).startswith(f"{alone}:clip-0000.ecdc: not an .ecdc stream")
    index = tar.with_suffix(".json")
    index.write_text("{}")
    assert error(tar).startswith(f"{index}: broken: ")


def test_tokens_of_another_codec_or_of_too_few_codebooks_are_refused(tmp_path):
    write_token_folder(tmp_path / "other", 4, fingerprint="cd" * 32)
    told = "made by codec cdcdcdcd, the model was trained on tokens of codec abababab"
    assert error(tmp_path / "other") == f"{tmp_path / 'other'}: {told}"
    assert told in error(tmp_path / "other" / "tokens-000000.tar")
    (tmp_path / "other" / "tokens-000000.json").unlink()  # then the streams tell it
    assert all(
        "codes of encodec_24khz+cdcdcdcd" in str(bad.error) for bad in read(tmp_path / "other" / "tokens-000000.tar")
    )
    write_token_folder(tmp_path / "few", 4, num_codebooks=2)
    assert "stored with 2 codebooks, the model reads 16" in error(tmp_path / "few", num_codebooks=16)


def test_folders_and_globs_are_what_lies_there_in_order(tmp_path):
    for name in ("b/two.ecdc", "a/one.ECDC", "c[1]/three.ecdc", "a/.hidden.ecdc"):
        write_stream(tmp_path / name, draw_codes(10))
    (tmp_path / "b" / "notes.txt").write_text("nothing for us")
    (tmp_path / "b" / "sound.wav").write_bytes(b"")
    names = ["a/one.ECDC", "b/sound.wav", "b/two.ecdc", "c[1]/three.ecdc"]
    for url in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/**", f"file://{tmp_path}"):
        found = [item for item in inputs().find(url) if isinstance(item, Source)]
        assert [str(item.url).removeprefix("file://") for item in found] == [f"{tmp_path}/{name}" for name in names]
    assert [item.kind for item in found] == ["stream", "audio", "stream", "stream"]
    (only,) = inputs().find(f"{tmp_path}/*/two.*")
    assert only == Source(f"{tmp_path}/b/two.ecdc", "stream")
    (bracketed,) = inputs().find(f"{tmp_path}/c[1]/three.ecdc")
    assert bracketed == Source(f"{tmp_path}/c[1]/three.ecdc", "stream")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("gone", "gone: no such folder"),
        ("texts", "texts: no .ecdc, .tar or audio file among 1 files"),
        ("texts/*.ecdc", "nothing matches"),
        ("nosuch://b/x.ecdc", "nosuch://b/x.ecdc: "),
    ],
)
def test_an_argument_that_stands_for_nothing_is_a_failure(tmp_path, place, message):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    assert message in error(place if "://" in place else tmp_path / place)


def test_a_url_with_credentials_is_refused_and_not_repeated():
    (got,) = inputs().find("s3://me:secret@bucket/clip.ecdc")
    assert isinstance(got, Failure) and isinstance(got.error, MegascaleError)
    assert "credentials" in str(got.error) and "secret" not in f"{got.source} {got.error}"
