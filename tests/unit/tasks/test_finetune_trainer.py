"""Training of classifiers in this process: what learns and what stays, when it ends, and what the result files hold."""

import csv
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from stores import HookedStore, hooked_copy
from support import write_paced_tokens, write_pretrained, write_token_folder
from torch import Tensor

from megascale import storage
from megascale.config import validate
from megascale.export import AudioClassifier
from megascale.log import read_metrics
from megascale.model import mega_audioformer
from megascale.model.config import ModelConfig
from megascale.seeding import torch_generator
from megascale.tasks import finetune
from megascale.tasks.finetune_config import FinetuneConfig
from megascale.tasks.finetune_data import open_clips
from megascale.tasks.finetune_trainer import Trainer, rate_share
from megascale.tasks.regression_start import STRENGTHS
from megascale.train import checkpoint

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Tokens of one class a clip, of two windows a recording, and of several labels a clip; and a tiny encoder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_paced_tokens(folder / "tokens", 40)
    write_paced_tokens(folder / "windows", 40, clips_per_recording=2, labels=lambda i: {"class": "ab"[i // 2 % 2]})
    # codes 0 to 7 in low clips and 8 to 15 in high ones: a few updates tell them apart
    codes_NQT = np.random.default_rng(0).integers(0, 8, (40, 2, 75)) + 8 * (np.arange(40) % 2)[:, None, None]
    write_token_folder(folder / "easy", 40, codes=codes_NQT, labels=lambda i: {"class": "ab"[i % 2]})
    tags = [["/m/low", "/m/any"], ["/m/high", "/m/any"]]
    write_token_folder(folder / "tags", 40, codes=codes_NQT, labels=lambda i: {"tags": tags[i % 2]})
    write_pretrained(folder / "encoder", 2)
    return folder


def config_of(inputs: Path, output: Path, tokens: str = "tokens", **sections: Any) -> FinetuneConfig:
    tree = {
        "data": {"url": str(inputs / tokens)},
        "task": {"label": "class", "protocol": "official"},
        "arm": "ft",
        "checkpoint": str(inputs / "encoder"),
        "optim": {"lr": 3e-3},
        "output": {"url": str(output)},
    }
    sections["train"] = {"epochs": 2, "batch": 4} | sections.get("train", {})
    return validate(FinetuneConfig, "finetune", tree | sections)


def encoder_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name.startswith("global_encoder.")}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Watched(Trainer):
    """Keeps the weights of each validation."""

    seen: list[dict[str, Tensor]]

    def _validate(self, steps: int) -> dict[str, float]:
        self.seen.append({name: value.clone() for name, value in self._engine.module.state_dict().items()})
        return super()._validate(steps)


def weights_by_epoch(config: FinetuneConfig) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Train; return the first weights, and those after each epoch."""
    data = open_clips(config)
    model, _ = finetune._build_model(config, data.manifest, data.classes)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Watched(config, model, data, Path(config.output.url))
    trainer.seen = []
    trainer.fit(quiet=True)
    return first, trainer.seen


# ------------------------------------------------------------------------------------------------- what learns, and when


@pytest.mark.parametrize("stage", [0, 1])
def test_probe_leaves_the_encoder_as_it_is(inputs, tmp_path, stage):
    config = config_of(inputs, tmp_path / "run", arm="probe", zero={"stage": stage})
    first, (_, last) = weights_by_epoch(config)
    assert equal(encoder_of(last), encoder_of(first))
    assert not torch.equal(last["head.weight"], first["head.weight"])
    saved = safetensors.torch.load_file(inputs / "encoder" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in encoder_of(last).items())


def test_layer_decay_is_for_what_is_pretrained(inputs, tmp_path):
    plain = weights_by_epoch(config_of(inputs, tmp_path / "plain", arm="scratch"))[1][-1]
    told = {"lr": 3e-3, "layer_decay": 0.5}
    assert equal(weights_by_epoch(config_of(inputs, tmp_path / "told", arm="scratch", optim=told))[1][-1], plain)


# ------------------------------------------------------------------------------- where it begins, and what the head sees


@pytest.mark.parametrize("tokens", ["easy", "tags"])
@pytest.mark.parametrize(
    ("arm", "zero"),
    [
        ("scratch", {}),
        ("ft", {}),
        ("ft", {"stage": 1}),
        ("ft", {"stage": 2, "precision": "bf16"}),
        ("probe", {}),
        ("probe", {"stage": 1, "precision": "bf16"}),
    ],
)
def test_classifier_begins_as_a_logistic_regression_on_what_it_sees(inputs, tmp_path, arm, zero, tokens):
    """Without training to speak of, that alone tells the classes apart; random weights don't."""
    sections: dict[str, Any] = {"arm": arm, "zero": zero, "optim": {"lr": 1e-30}, "train": {"epochs": 1}}
    if tokens == "tags":
        sections["task"] = {"label": "tags", "kind": "multi", "protocol": "official"}
    started = config_of(inputs, tmp_path / "started", tokens, head={"start": "regression"}, **sections)
    result = finetune.run(started, quiet=True)
    plain = finetune.run(config_of(inputs, tmp_path / "plain", tokens, **sections), quiet=True)
    name = "map" if tokens == "tags" else "accuracy"
    assert result["best_epoch"] == 0 and plain["best_epoch"] == 1
    assert result[name] >= 0.95 and result["valid_loss"] < plain["valid_loss"] / 1.5
    first, second = (row for row in read_metrics(tmp_path / "started" / "metrics.jsonl") if "valid/loss" in row)
    assert first["step"] == 0 and first["valid/regression_strength"] in STRENGTHS
    assert second["valid/loss"] == first["valid/loss"] == result["valid_loss"], "training begins with these weights"


def test_head_that_sees_deviations_is_trained_saved_and_scored(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run", head={"pooling": "mean_std", "start": "regression"})
    finetune.run(config, quiet=True)
    model = AudioClassifier.from_pretrained(tmp_path / "run")
    assert model.pooling == "mean_std" and model.head.in_features == 2 * model.global_encoder.config.width
    data = open_clips(config)
    scored = {row["recording"]: float(row[data.classes[0]]) for row in table(tmp_path / "run")}
    for i in data.splits["test"]:
        with torch.no_grad():
            answer_1C = model(torch.from_numpy(data.clips[i].codes_QT.T.astype("int64"))[None]).softmax(dim=-1)
        assert scored[data.clips[i].recording] == pytest.approx(float(answer_1C[0, 0]), abs=2e-4)  # told to four places
    assert len(set(scored.values())) > 1


def test_run_that_was_stopped_writes_each_step_once(inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run", head={"start": "regression"})
    weights_by_epoch(config)  # trained, and no result
    finetune.run(config, quiet=True)
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "valid/acc" in row]
    assert steps == [0, 5, 10]


def test_layers_learn_less_the_further_down_they_are(inputs, tmp_path):
    optim = {"lr": 1e-3, "layer_decay": 0.1, "warmup_share": 0.0, "weight_decay": 0.0}
    config = config_of(inputs, tmp_path / "run", optim=optim, train={"epochs": 1, "batch": 20})
    first, (last,) = weights_by_epoch(config)
    moves = {name: float((last[name] - first[name]).abs().max()) for name in last}
    # one update, of the rate times the share; roundings of weights of size 1 are at 1e-7
    assert moves["head.weight"] == pytest.approx(1e-3, rel=0.01)
    assert moves["global_encoder.norm.weight"] == pytest.approx(1e-3, rel=0.01)
    assert moves["global_encoder.blocks.0.attention_norm.weight"] == pytest.approx(1e-4, rel=0.01)
    assert moves["global_encoder.embedding.table.weight"] == pytest.approx(1e-5, rel=0.05)


def test_rate_of_every_weight_falls_with_the_layers_above_it():
    shape = ModelConfig(layers=3, width=32, heads=2, mlp_width=64, local_layers=1, local_width=16, local_heads=1)
    model = mega_audioformer.AudioClassifier(shape, 2, 3, torch_generator(0, "test"))
    depth = {"head": 0, "global_encoder.norm": 0, "global_encoder.blocks.2": 1, "global_encoder.blocks.1": 2}
    depth |= {"global_encoder.blocks.0": 3, "global_encoder.embedding": 4, "global_encoder.patch_proj": 4}
    for name, _ in model.named_parameters():
        (above,) = [n for prefix, n in depth.items() if name.startswith(f"{prefix}.")]
        assert rate_share(name, 3, 0.5) == 0.5**above
        assert rate_share(name, 3, 1.0) == 1.0


# ---------------------------------------------------------------------------------------------------------- when it ends


def test_run_ends_when_validation_gets_no_better_and_says_at_which_epoch(inputs, tmp_path):
    """With a rate of nothing the first epoch stays the best."""
    still = {"optim": {"lr": 1e-30}}
    ended = finetune.run(config_of(inputs, tmp_path / "ended", train={"epochs": 9, "patience": 3}, **still), quiet=True)
    assert (ended["best_epoch"], ended["last_epoch"]) == (1, 4)
    assert len([row for row in read_metrics(tmp_path / "ended" / "metrics.jsonl") if "valid/acc" in row]) == 4
    whole = finetune.run(config_of(inputs, tmp_path / "whole", train={"epochs": 5}, **still), quiet=True)
    assert (whole["best_epoch"], whole["last_epoch"]) == (1, 5)
    begun = config_of(
        inputs, tmp_path / "begun", train={"epochs": 9, "patience": 3}, head={"start": "regression"}, **still
    )
    ended = finetune.run(begun, quiet=True)
    assert (ended["best_epoch"], ended["last_epoch"]) == (0, 3), "as it began it counts, too"


# ---------------------------------------------------------------------------------------------------------- model choice


def write_ambiguous_tokens(folder: Path) -> None:
    """Write two windows a recording, of two classes that are soon told apart; of validation's 10 recordings two are labelled
    wrongly, so that what is sure of everything is worse there than what is sure of most; second windows of validation and
    test are of both classes."""
    rng = np.random.default_rng(3)
    of_b_N = np.arange(80) // 8 % 2
    codes_NQT = rng.integers(0, 8, (80, 2, 40)) + 8 * of_b_N[:, None, None]
    codes_NQT[[4, 5, 12, 13]] = codes_NQT[[12, 13, 4, 5]]
    mixed = [i for i in range(16, 80) if i % 8 in (5, 7)]
    codes_NQT[mixed] = rng.integers(0, 16, (len(mixed), 2, 40))
    write_token_folder(
        folder, 80, frames=40, codes=codes_NQT, clips_per_recording=2, labels=lambda i: {"class": "ab"[of_b_N[i]]}
    )


def answers_of(config: FinetuneConfig, weights: dict[str, Tensor], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a split's probabilities_NC, window by window, and which class is true; windows of a recording are adjacent."""
    data = open_clips(config)
    model, _ = finetune._build_model(config, data.manifest, data.classes)
    model.load_state_dict(weights)
    clips = [data.clips[i] for i in data.splits[side]]
    codes_NTQ = torch.stack([torch.from_numpy(clip.codes_QT.T.astype("int64")) for clip in clips])
    with torch.no_grad():
        probabilities_NC = model(codes_NTQ).softmax(dim=-1).double().numpy()
    return probabilities_NC, np.array([data.classes.index(str(clip.labels["class"])) for clip in clips])


def test_weights_kept_are_those_of_the_epoch_that_is_best_on_validation_by_recording(tmp_path):
    write_ambiguous_tokens(tmp_path / "tokens")
    write_pretrained(tmp_path / "encoder", 2)
    sections = {"optim": {"lr": 1e-3}, "train": {"epochs": 8, "batch": 8}}
    _, seen = weights_by_epoch(config_of(tmp_path, tmp_path / "watched", **sections))
    config = config_of(tmp_path, tmp_path / "run", **sections)
    result = finetune.run(config, quiet=True)
    told = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "valid/acc" in row]
    merits = []
    for weights, row in zip(seen, told, strict=True):
        probabilities_NC, targets_N = answers_of(config, weights, "valid")
        sure_N = probabilities_NC[np.arange(20), targets_N]
        sure_R = sure_N.reshape(10, 2).mean(axis=1)
        merits.append((float((sure_R > 0.5).mean()), float(np.log(sure_R).mean())))
        # float32 passes of other batches
        assert (row["valid/acc"], row["valid/loss"]) == pytest.approx((merits[-1][0], -merits[-1][1]), abs=1e-4)
    assert abs(np.log(sure_N).mean() - merits[-1][1]) > 0.01, "by window the last would be another number"
    best = max(range(8), key=lambda epoch: merits[epoch])
    assert 0 < best < 7, "neither the first epoch nor the last, else this shows nothing"
    assert result["best_epoch"] == best + 1
    assert (result["valid_accuracy"], result["valid_loss"]) == (told[best]["valid/acc"], told[best]["valid/loss"])
    saved = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert equal(saved, seen[best])
    probabilities_NC, _ = answers_of(config, seen[best], "test")
    last_NC, _ = answers_of(config, seen[-1], "test")
    rows = table(tmp_path / "run")
    predicted_RC = np.array([[float(row["a"]), float(row["b"])] for row in rows])
    averaged_RC, last_RC = (each_NC.reshape(10, 2, 2).mean(axis=1) for each_NC in (probabilities_NC, last_NC))
    assert predicted_RC == pytest.approx(averaged_RC, abs=1e-4)
    assert np.abs(last_RC - averaged_RC).max() > 1e-2, "the last epoch's would be others"


# ---------------------------------------------------------------------------------------------------------- result files


def table(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "predictions.csv").open()))


def test_scores_are_by_recording_and_by_window(inputs, tmp_path):
    task = {"label": "class", "protocol": "stratified", "valid_share": 0.2, "test_share": 0.4}
    config = config_of(inputs, tmp_path / "run", tokens="windows", task=task)
    finetune.run(config, quiet=True)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["count"], result["clip"]["count"]) == (8, 16)
    assert result["split_sizes"] == {"train": 16, "valid": 8, "test": 16}
    assert sum(map(sum, result["confusion"])) == 8 and sum(map(sum, result["clip"]["confusion"])) == 16
    assert {"accuracy", "macro_f1", "per_class"} <= result["clip"].keys()
    assert len(table(tmp_path / "run")) == 8


def test_several_labels_are_learned_and_scored_by_map_and_d_prime(inputs, tmp_path):
    task = {"label": "tags", "kind": "multi", "protocol": "official"}
    train = {"epochs": 12, "batch": 4}
    config = config_of(inputs, tmp_path / "run", tokens="tags", task=task, train=train)
    finetune.run(config, quiet=True)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["classes"] == ["/m/any", "/m/high", "/m/low"]
    assert result["per_class"]["/m/any"] == {"ap": 1.0, "auc": None, "count": 10}
    assert result["map"] == 1.0, "they can be told apart"
    assert "accuracy" not in result and {"map", "auc", "d_prime"} <= result["clip"].keys()
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    by_epoch = [row["valid/map"] for row in metrics if "valid/map" in row]
    assert result["valid_map"] == max(by_epoch) == by_epoch[result["best_epoch"] - 1]
    losses = [row["train/loss"] for row in metrics if "train/loss" in row]
    assert losses[-1] < 0.5 * losses[0], "binary cross-entropy begins near log 2"
    assert 0.4 < losses[0] < 1.0
    rows = table(tmp_path / "run")
    assert {row["labels"] for row in rows} == {"/m/any;/m/high", "/m/any;/m/low"}
    for row in rows:
        sure = [name for name in result["classes"] if float(row[name]) >= 0.5]
        assert row["predicted"] == ";".join(sure)
    assert max(sum(float(row[name]) for name in result["classes"]) for row in rows) > 1.2, "no shares of one whole"


def save_pretrained(run: Path, step: int, valid_loss: float) -> Path:
    """A checkpoint of a pretraining run, whose weights are drawn from its step."""
    folder = checkpoint.step_folder(run / "checkpoints", step)
    checkpoint.begin(folder)
    write_pretrained(folder / "model", 2, seed=step)
    checkpoint.commit(folder, step, 16 * step, 1, valid_loss)
    return folder


def test_result_says_which_weights_it_began_with(inputs, tmp_path):
    best = save_pretrained(tmp_path / "pretrained", 1, 3.0)
    save_pretrained(tmp_path / "pretrained", 2, 4.0)
    run = str(tmp_path / "pretrained")
    results = {
        arm: finetune.run(config_of(inputs, tmp_path / arm, arm=arm, checkpoint=run)) for arm in ("probe", "scratch")
    }
    digest = hashlib.sha256((best / "model" / "model.safetensors").read_bytes()).hexdigest()
    found = {arm: [result[f"checkpoint{key}"] for key in ("", "_step", "_sha256")] for arm, result in results.items()}
    assert found == {"probe": [run, 1, digest], "scratch": [None, None, None]}


def test_checkpoint_that_gets_better_meanwhile_is_not_the_one_that_is_read(inputs, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    first = save_pretrained(tmp_path / "pretrained", 1, 3.0)
    later = save_pretrained(tmp_path / "later", 2, 2.0)
    reads: list[str] = []

    def commit_later(name: str) -> None:
        reads.append(name)
        if reads.count("manifest.json") == 2:  # once it was chosen
            for path in sorted(later.rglob("*"), key=lambda path: path.name == "manifest.json"):
                if path.is_file():
                    place = f"hooked://folder/checkpoints/{later.name}/{path.relative_to(later).as_posix()}"
                    storage.publish_bytes(place, path.read_bytes())

    with hooked_copy(tmp_path / "pretrained") as url:
        HookedStore.hook = commit_later
        result = finetune.run(config_of(inputs, tmp_path / "run", arm="probe", checkpoint=url))
        assert checkpoint.find_model(url).step == 2, "by now"
    kept = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")
    begun = safetensors.torch.load_file(first / "model" / "model.safetensors")
    assert result["checkpoint_step"] == 1
    assert all(torch.equal(value, begun[name]) for name, value in encoder_of(kept).items())


def test_result_says_what_the_split_check_found_and_the_model_what_it_answers(inputs, tmp_path):
    folds = {"label": "class", "protocol": "folds", "folds": 4, "fold": 1}
    config = config_of(inputs, tmp_path / "run", task=folds, train={"epochs": 1})
    result = finetune.run(config, quiet=True)
    assert (result["protocol"], result["fold"], result["task_kind"]) == ("folds", 1, "single")
    assert result["split_check"]["recordings"] == {"train": 20, "valid": 10, "test": 10}
    assert "no recording on two sides" in result["split_check"]["summary"]
    assert result["split_check"]["summary"] in finetune.describe_plan(config)
    facts = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (facts["task_kind"], facts["classes"]) == ("single", ["high", "low"])
    plain = finetune.run(config_of(inputs, tmp_path / "plain", train={"epochs": 1}), quiet=True)
    assert plain["fold"] is None
