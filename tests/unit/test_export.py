"""from_pretrained and save_pretrained: what they read, write and refuse, and what the card says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from kept_models import CODEC, CORPUS, facts_of, pretrained, weights_of, write_finetuned, write_run
from stores import HookedStore, hooked_copy
from support import write_token_folder
from torch import Tensor

from megascale import storage
from megascale.data.index import StoredClip, read_clips, read_manifest
from megascale.errors import CheckpointError
from megascale.export import AudioClassifier, MegaAudioFormer, embed_clips, load_model
from megascale.model import mega_audioformer
from megascale.model_card import RunFacts, model_card
from megascale.tokens import PUBLISHED_NAME
from megascale.train import checkpoint


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run")


def assert_weights(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    weights = weights_of(model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def header_of(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---")[1])


@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("", 10),
        ("checkpoints/step-00000020", 20),
        ("checkpoints/step-00000020/model", 20),
        ("checkpoints/step-00000010/model/", 10),
    ],
)
def test_a_run_is_its_best_checkpoint_and_each_folder_in_it_its_own(run, place, step):
    model = MegaAudioFormer.from_pretrained(run / place)
    assert isinstance(model, mega_audioformer.MegaAudioFormer) and not model.training
    assert_weights(model, weights_of(pretrained(step)))
    assert f"| updates | {step} of 20 |" in model.card


def test_averages_are_read_where_they_are_named(run):
    model = MegaAudioFormer.from_pretrained(run / "checkpoints" / "step-00000020" / "model_ema")
    assert_weights(model, weights_of(pretrained(21)))


def test_a_model_in_a_store_is_read_and_verified_there(run):
    place = checkpoint.step_folder(run / "checkpoints", 10)
    with hooked_copy(place / "model") as url:
        assert_weights(MegaAudioFormer.from_pretrained(url), weights_of(pretrained(10)))
        HookedStore.store.clear()
        for path in (p for p in run.rglob("*") if p.is_file()):
            storage.publish_bytes(f"hooked://run/{path.relative_to(run)}", path.read_bytes())
        model = MegaAudioFormer.from_pretrained("hooked://run")
        assert_weights(model, weights_of(pretrained(10)))
        assert "0.00321" in model.card and "| `valid/loss` | 2.5000 |" in model.card
        storage.publish_bytes("hooked://run/checkpoints/step-00000010/model/config.json", b"{}")
        with pytest.raises(CheckpointError, match="sha256"):
            MegaAudioFormer.from_pretrained("hooked://run")


def test_what_is_saved_is_the_model_folder_byte_by_byte_and_a_card(run, tmp_path):
    kept = run / "checkpoints" / "step-00000010" / "model"
    MegaAudioFormer.from_pretrained(run).save_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (kept / name).read_bytes()
    # and all that reads a checkpoint reads it
    weights, facts = checkpoint.read_model(str(tmp_path / "out"))
    assert facts == facts_of() and weights.keys() == weights_of(pretrained()).keys()


def test_an_export_is_read_without_its_run_and_keeps_its_card(run, tmp_path):
    MegaAudioFormer.from_pretrained(run).save_pretrained(tmp_path / "out")
    shutil.rmtree(run)
    again = MegaAudioFormer.from_pretrained(tmp_path / "out")
    assert_weights(again, weights_of(pretrained(10)))
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "README.md").read_bytes() == (tmp_path / "out" / "README.md").read_bytes()


@pytest.mark.parametrize(("pooling", "told"), [("mean", "the mean"), ("mean_std", "mean and standard deviation")])
def test_a_classifier_goes_the_same_way(tmp_path, pooling, told):
    reference = write_finetuned(tmp_path / "run", pooling=pooling)
    codes_BTQ = torch.randint(1024, (2, 20, 2), generator=torch.Generator().manual_seed(1))
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        model = AudioClassifier.from_pretrained(place)
        assert model.classes == ["blues", "jazz", "rock"]
        assert torch.equal(model(codes_BTQ), reference(codes_BTQ))
    model.save_pretrained(tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"the global encoder, {told} over frames, one linear layer." in card
    assert "| classes | blues, jazz, rock |" in card and "| accuracy | 0.625 |" in card and "/secret" not in card
    assert header_of(card)["pipeline_tag"] == "audio-classification"


def test_each_kind_of_model_is_read_by_its_own_class(run, tmp_path):
    write_finetuned(tmp_path / "finetuned")
    assert type(load_model(str(run))) is MegaAudioFormer
    assert type(load_model(str(tmp_path / "finetuned"))) is AudioClassifier
    with pytest.raises(CheckpointError, match=r"a classifier; AudioClassifier\.from_pretrained reads it"):
        MegaAudioFormer.from_pretrained(tmp_path / "finetuned")
    with pytest.raises(CheckpointError, match=r"no classifier; MegaAudioFormer\.from_pretrained"):
        AudioClassifier.from_pretrained(run)


def test_pooling_of_a_later_version_is_refused(tmp_path):
    write_finetuned(tmp_path / "run")
    told = tmp_path / "run" / "model" / "config.json"
    told.write_text(told.read_text().replace('"pooling": "mean"', '"pooling": "median"'))
    with pytest.raises(
        CheckpointError, match=r"model: config\.json tells of pooling='median', which is not known here"
    ):
        AudioClassifier.from_pretrained(tmp_path / "run" / "model")


def test_damaged_and_missing_models_are_one_line(run, tmp_path):
    kept = run / "checkpoints" / "step-00000010" / "model"
    loose = shutil.copytree(kept, tmp_path / "loose")
    (kept / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: its sha256"):
        MegaAudioFormer.from_pretrained(run)
    with pytest.raises(CheckpointError, match="no such folder, and no id of a repo"):
        MegaAudioFormer.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint here: .*config\.json is missing"):
        MegaAudioFormer.from_pretrained(tmp_path / "empty")
    for facts, told in (
        ({"num_codebooks": 2}, "does not describe a model: 'codec'"),
        (facts_of() | {"model": {"layers": "many"}}, "does not describe a model"),
        (facts_of() | {"num_codebooks": 4}, "size mismatch"),
    ):
        (loose / "config.json").write_text(json.dumps(facts))
        with pytest.raises(CheckpointError, match=told) as failure:
            MegaAudioFormer.from_pretrained(loose)
        assert "\n" not in str(failure.value)


def test_a_model_built_by_hand_says_that_it_lacks_its_facts(tmp_path):
    model = MegaAudioFormer(pretrained().global_encoder.config, 2, torch.Generator().manual_seed(0))
    with pytest.raises(CheckpointError, match="set its `facts` first"):
        model.save_pretrained(tmp_path / "out")
    model.facts = facts_of()
    model.save_pretrained(tmp_path / "out")
    assert_weights(MegaAudioFormer.from_pretrained(tmp_path / "out"), weights_of(model))


def test_the_card_says_what_the_run_was(run):
    card = MegaAudioFormer.from_pretrained(run).card
    assert header_of(card)["library_name"] == "megascale" and "license" not in header_of(card)
    for said in (
        "1.5 kbps: 2 codebooks",
        CODEC.fingerprint,
        CODEC.name,
        CODEC.origin,
        "not EnCodec's published weights",
        CORPUS,
        "| updates | 10 of 20 |",
        "| clips seen | 160 |",
        "| `valid/loss` | 2.5000 |",
        "| `valid/acc_q0` | 0.4000 |",
        "lr: 0.00321",
        "clip_seconds: 1.0",
    ):
        assert said in card
    assert "/nowhere" not in card and str(run) not in card  # a card is public: where things lay stays at home
    assert "CC BY-NC" not in card and "train/loss" not in card


def test_nothing_is_said_of_a_run_that_is_not_known(run, tmp_path):
    bare = shutil.copytree(run / "checkpoints" / "step-00000010" / "model", tmp_path / "elsewhere" / "model")
    (tmp_path / "elsewhere" / "config.yaml").write_text("train: {steps: 99}\n")  # of something else
    card = MegaAudioFormer.from_pretrained(bare).card
    assert CODEC.fingerprint in card and CORPUS in card
    for word in ("updates", "clips seen", "valid/", "Config of the run", "99"):
        assert word not in card


def test_the_card_names_the_licence_of_published_codec_weights():
    facts = facts_of() | {"codec": CODEC.model_dump() | {"name": PUBLISHED_NAME, "origin": "encodec_24khz-d7cc33bc.th"}}
    card = model_card(facts, RunFacts(), codec_included=False)
    assert "CC BY-NC 4.0" in card and "not in this folder" in card
    assert "None" not in card


def test_the_card_names_the_language_model_that_weights_began_as():
    card = model_card(facts_of() | {"init_from": "hf:EuroBERT/EuroBERT-210m"}, RunFacts(), codec_included=False)
    assert "| first weights of the global encoder | `hf:EuroBERT/EuroBERT-210m` |" in card


def test_the_card_of_a_fine_tuned_run_has_one_shape_and_no_places(tmp_path):
    write_finetuned(tmp_path / "run")
    made = {
        "data": {"url": "/secret/tokens", "bitrate_kbps": 1.5},
        "task": {"label": "genre", "lists": {"train": "/secret/train.txt"}},
        "checkpoint": "/secret/run",
        "model": {"layers": 12, "width": 768, "init_from": None},  # defaults, which the checkpoint goes before
        "zero": {"stage": 1, "deepspeed_json": "/secret/ds.json"},
        "output": {"url": "/secret/out"},
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(made))
    card = AudioClassifier.from_pretrained(tmp_path / "run").card
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert config == {"data": {"bitrate_kbps": 1.5}, "task": {"label": "genre"}, "zero": {"stage": 1}}
    assert "2 layers of width 32" in card and "/secret" not in card
    # without a checkpoint the shape is the config's own
    scratch = made | {"checkpoint": None, "model": {"layers": 2, "width": 32, "init_from": "hf:/secret/eurobert"}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(scratch))
    card = AudioClassifier.from_pretrained(tmp_path / "run").card
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert config["model"] == {"layers": 2, "width": 32, "init_from": "hf:FOLDER"}
    assert "/secret" not in card


def test_the_card_does_not_say_where_a_language_model_lay():
    card = model_card(facts_of() | {"init_from": "hf:/secret/eurobert"}, RunFacts(), codec_included=False)
    assert "| first weights of the global encoder | `hf:FOLDER` |" in card


@pytest.mark.parametrize("frames", [40, [40, 17, 33, 40, 5, 40, 40, 9]])
def test_clips_are_embedded_as_fine_tunings_last_layer_sees_them(tmp_path, frames):
    write_token_folder(tmp_path / "tokens", 8, frames=frames)
    clips = list(read_clips(str(tmp_path / "tokens"), read_manifest(str(tmp_path / "tokens")), 2))
    model = write_finetuned(tmp_path / "run")
    embedded_ND = embed_clips(model.global_encoder, clips, batch=3)
    for clip, embedded_D in zip(clips, embedded_ND, strict=True):
        seen: list[Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            model(torch.from_numpy(clip.codes_QT.T.astype("int64"))[None])
        hook.remove()
        # alone and in a batch, padded or not, sums are rounded in another order
        torch.testing.assert_close(torch.from_numpy(embedded_D), seen[0][0], rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in embedded_ND.tolist()}) == len(clips)


def test_embedding_no_clip_gives_no_row():
    none: list[StoredClip] = []
    assert embed_clips(pretrained().global_encoder, none).shape == (0, 32)
