"""HEAR's entry points: shapes, times, the codec that belongs to a model, and the bits of fine-tuning's own path."""

import errno
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from kept_models import CODEC, write_finetuned, write_run
from stores import HookedStore, hooked_copy
from support import tone

from megascale import hear, storage
from megascale.data.index import CodecFacts, StoredClip
from megascale.errors import AudioError, CheckpointError, ConfigError
from megascale.export import AudioClassifier, MegaAudioFormer
from megascale.tokenize.audio import read_clip
from megascale.tokenize.codec import Codec

pytestmark = pytest.mark.usefixtures("one_thread")
RATE_HZ = 48_000


@pytest.fixture
def made(fitted_codec) -> CodecFacts:
    return CODEC.model_copy(update={"name": fitted_codec.name, "fingerprint": fitted_codec.fingerprint})


@pytest.fixture
def codec_file(tmp_path, fitted_codec) -> Path:
    storage.publish_bytes(str(tmp_path / "tokens" / "codec.safetensors"), fitted_codec.to_bytes())
    return tmp_path / "tokens" / "codec.safetensors"


@pytest.fixture
def model(tmp_path, made, codec_file) -> hear.HearModel:
    return hear.load_model(str(write_run(tmp_path / "run", made, codec_file.parent)))


def batch(count: int, samples: int = RATE_HZ // 2) -> torch.Tensor:
    clips = [tone(samples / RATE_HZ, RATE_HZ, 200 * 1.3**i, seed=i) for i in range(count)]
    return torch.from_numpy(np.stack(clips))


def test_the_model_has_the_attributes_that_hear_asks_for(model):
    assert isinstance(model, torch.nn.Module) and not model.training
    assert model.sample_rate == RATE_HZ
    assert model.scene_embedding_size == model.timestamp_embedding_size == 32


def test_timestamps_are_the_centres_of_frames_in_milliseconds(model):
    embeddings, timestamps = hear.get_timestamp_embeddings(batch(3, 640 * 30 + 1), model)
    assert embeddings.shape == (3, 31, 32) and embeddings.dtype == torch.float32
    assert timestamps.shape == (3, 31) and timestamps.dtype == torch.float32
    expected = [(i + 0.5) * 1000 / 75 for i in range(31)]
    for row in timestamps:
        assert row.tolist() == pytest.approx(expected, rel=1e-6)  # float32


def test_a_scene_is_the_mean_over_its_frames(model):
    audio = batch(3)
    frames, _ = hear.get_timestamp_embeddings(audio, model)
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.shape == (3, 32) and scenes.dtype == torch.float32
    assert torch.equal(scenes, frames.mean(dim=1))
    assert not torch.allclose(scenes[0], scenes[1], atol=1e-3)


def test_embeddings_equal_the_fine_tuning_paths_to_the_last_bit(
    tmp_path, made, codec_file, fitted_codec, process_group
):
    """The path: files to tokens as the tokenization job reads them, scored by fine-tuning's own trainer and engine."""
    from megascale.tasks.finetune_config import FinetuneConfig
    from megascale.tasks.finetune_data import LabelledClips
    from megascale.tasks.finetune_trainer import Trainer
    from megascale.train.engine import Engine

    audio = batch(6)
    clips = [_tokenised(tmp_path, i, clip_S.numpy(), fitted_codec) for i, clip_S in enumerate(audio)]
    write_finetuned(tmp_path / "finetuned", made)
    classifier = AudioClassifier.from_pretrained(tmp_path / "finetuned")
    config = FinetuneConfig(
        data={"url": "unused"},
        task={"label": "genre"},
        arm="scratch",
        output={"url": "unused"},
        train={"eval_batch": 6},
    )
    splits = {name: list(range(6)) for name in ("train", "valid", "test")}
    manifest = None  # is no part of scoring
    trainer = Trainer(config, classifier, LabelledClips(manifest, clips, classifier.classes, splits, {}), tmp_path)
    trainer._engine = Engine(classifier, config.optim, config.zero, micro_batch=6, accumulation=1, num_steps=1)
    seen: list[torch.Tensor] = []
    classifier.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainer._predict(splits["test"])
    by_hear = hear.get_scene_embeddings(audio, hear.load_model(f"{tmp_path / 'finetuned'}::{codec_file}"))
    assert torch.equal(by_hear, seen[0])

    codes_BTQ = torch.stack([torch.from_numpy(clip.codes_QT.T.astype(np.int64)) for clip in clips])
    with torch.no_grad():
        AudioClassifier.from_pretrained(tmp_path / "finetuned")(codes_BTQ)
        classifier(codes_BTQ)
    assert torch.equal(by_hear, seen[1])


def _tokenised(folder: Path, i: int, clip_S: np.ndarray, codec: Codec) -> StoredClip:
    path = folder / f"{i}.wav"
    soundfile.write(path, clip_S, RATE_HZ, subtype="FLOAT")
    (codes_QT,) = codec.encode([read_clip(str(path))], 2)
    return StoredClip(path.stem, codes_QT, path.stem, path.name, {"genre": ("blues", "jazz", "rock")[i % 3]}, None)


def test_the_codec_is_the_one_named_the_one_beside_the_model_or_the_tokens_own(tmp_path, made, codec_file, model):
    audio = batch(2)
    expected = hear.get_scene_embeddings(audio, model)
    alone = write_run(tmp_path / "alone", made)
    with pytest.raises(
        CheckpointError, match=f"codec {made.fingerprint[:8]} does not lie beside it; load {alone}::CODEC"
    ):
        hear.load_model(str(alone))
    kept = alone / "checkpoints" / "step-00000010" / "model"
    assert torch.equal(hear.get_scene_embeddings(audio, hear.load_model(f"{kept}::{codec_file}")), expected)
    (kept / "codec.safetensors").write_bytes(codec_file.read_bytes())
    assert torch.equal(hear.get_scene_embeddings(audio, hear.load_model(str(kept))), expected)


def test_an_export_takes_a_calibrated_codec_along_if_it_is_the_models_own(tmp_path, made, codec_file):
    run = write_run(tmp_path / "run", made, codec_file.parent)
    MegaAudioFormer.from_pretrained(run).save_pretrained(tmp_path / "out")
    MegaAudioFormer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "twice")
    for place in ("out", "twice"):
        assert (tmp_path / place / "codec.safetensors").read_bytes() == codec_file.read_bytes()
        assert "`codec.safetensors` in this folder" in (tmp_path / place / "README.md").read_text()
    audio = batch(2)
    alone, whole = (hear.load_model(str(place)) for place in (tmp_path / "out", run))
    assert torch.equal(hear.get_scene_embeddings(audio, alone), hear.get_scene_embeddings(audio, whole))

    other = MegaAudioFormer.from_pretrained(write_run(tmp_path / "other", CODEC, codec_file.parent))
    assert other.codec_url is None and "It is not in this folder" in other.card


def test_the_codec_beside_tokens_in_a_store_is_found_and_taken_along(tmp_path, made, codec_file):
    with hooked_copy(codec_file.parent) as tokens:
        run = write_run(tmp_path / "run", made, tokens)
        MegaAudioFormer.from_pretrained(run).save_pretrained(tmp_path / "out")
        assert hear.load_model(str(run)).codec.fingerprint == made.fingerprint
    assert (tmp_path / "out" / "codec.safetensors").read_bytes() == codec_file.read_bytes()


def test_a_fine_tuned_run_has_the_codec_of_its_labelled_tokens(tmp_path, made, codec_file):
    write_finetuned(tmp_path / "run", made)
    assert AudioClassifier.from_pretrained(tmp_path / "run").codec_url is None
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": {"url": str(codec_file.parent)}}))
    assert hear.load_model(str(tmp_path / "run")).codec.fingerprint == made.fingerprint


def test_a_store_that_fails_costs_the_codec_and_not_the_model(tmp_path, made, codec_file, capsys):
    def refuse(name: str) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    with hooked_copy(codec_file.parent) as tokens:
        run = write_run(tmp_path / "run", made, tokens)
        HookedStore.hook = staticmethod(refuse)
        model = MegaAudioFormer.from_pretrained(run)
    assert model.codec_url is None and "It is not in this folder" in model.card
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tokens}/codec.safetensors: ") and line.endswith("; going on without the model's codec")


def test_an_export_over_another_models_leaves_neither_its_card_nor_its_codec(tmp_path, made, codec_file):
    MegaAudioFormer.from_pretrained(write_run(tmp_path / "run", made, codec_file.parent)).save_pretrained(
        tmp_path / "out"
    )
    write_finetuned(tmp_path / "finetuned", CODEC)
    model = AudioClassifier.from_pretrained(tmp_path / "finetuned")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == model.card
    assert "pipeline_tag: audio-classification" in AudioClassifier.from_pretrained(tmp_path / "out").card
    assert not (tmp_path / "out" / "codec.safetensors").exists()


def test_an_export_deletes_no_codec_that_is_its_own_or_that_no_model_lay_beside(tmp_path, made, codec_file):
    for place, codec in (("own", made), ("foreign", CODEC)):
        model = MegaAudioFormer.from_pretrained(write_run(tmp_path / f"run-{place}", codec))
        (tmp_path / place).mkdir()
        (tmp_path / place / "codec.safetensors").write_bytes(codec_file.read_bytes())
        model.save_pretrained(tmp_path / place)
    assert all((tmp_path / place / "codec.safetensors").exists() for place in ("own", "foreign"))
    MegaAudioFormer.from_pretrained(tmp_path / "run-own").save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "codec.safetensors").exists()


def test_another_codec_is_refused(tmp_path, codec_file):
    run = write_run(tmp_path / "run", CODEC)
    with pytest.raises(CheckpointError, match=f"was trained on tokens of codec {CODEC.fingerprint[:8]}"):
        hear.load_model(f"{run}::{codec_file}")


def test_a_path_is_needed():
    with pytest.raises(ConfigError, match="a path is needed"):
        hear.load_model()


@pytest.mark.parametrize("audio", [torch.zeros(48_000), torch.zeros(2, 0), torch.zeros(0, 48_000)])
def test_audio_of_another_shape_is_refused(model, audio):
    with pytest.raises(AudioError, match=r"\(clips, samples\) are needed"):
        hear.get_scene_embeddings(audio, model)


def test_audio_that_is_not_finite_is_refused(model):
    audio = batch(2)
    audio[1, 100] = float("nan")
    with pytest.raises(AudioError, match="not finite"):
        hear.get_scene_embeddings(audio, model)
