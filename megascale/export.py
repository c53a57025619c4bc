"""Kept models for use elsewhere: from_pretrained, save_pretrained, push_to_hub, and what a clip is embedded as.

    from megascale.export import AudioClassifier, MegaAudioFormer
    model = MegaAudioFormer.from_pretrained("runs/x")   # a run, a checkpoint, a model/ folder, any URL of one, or a hub id
    model.save_pretrained("folder")                     # model.safetensors, config.json, README.md
    model.push_to_hub("name/of-repo")

The files are those of a kept checkpoint's `model/` folder, and a card filled from its run. The models are those of
`megascale/model`, with huggingface_hub's mixin on; training needs neither, so it does not carry them.
"""

import json
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self, get_args

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from megascale import hub, run_folder, storage
from megascale.data.index import CodecFacts, StoredClip
from megascale.data.loader import collate
from megascale.errors import CheckpointError, DataError, StorageError
from megascale.log import read_metrics, say
from megascale.model import mega_audioformer
from megascale.model.config import ModelConfig, Pooling
from megascale.model.mega_audioformer import GlobalEncoder, mean_over_frames
from megascale.model_card import CODEC_FILE, RunFacts, model_card
from megascale.seeding import torch_generator
from megascale.tokens import PUBLISHED_NAME
from megascale.train import manifest as manifests
from megascale.train.checkpoint import EMA, checkpoint_of, read_model, write_model
from megascale.train.manifest import CHECKPOINTS

_CARD, _CONFIG, _WEIGHTS = "README.md", "config.json", "model.safetensors"


@dataclass(frozen=True)
class Kept:
    """A kept model as it was read.

    url: its `model/` folder. checkpoint, run: the folders it lies in, as far as there are any. weights: on the CPU. facts:
    its `config.json`. card: its README.md, where it was exported with one. codec_url: the codec of its tokens, if that
    was calibrated and lies beside it, or beside the tokens that its run was trained on.
    """

    url: str
    checkpoint: str | None
    run: str | None
    weights: dict[str, Tensor]
    facts: dict[str, Any]
    card: str | None
    codec_url: str | None


def read_kept(name: str, **hub_options: Any) -> Kept:
    """Read a model.

    Args:
        name: a pretraining run (its best checkpoint), a checkpoint, a `model/` or `model_ema/` folder or an export of
            one, a fine-tuning run, at any URL; or the id of a repo on the hub. A folder goes before a repo. What a
            checkpoint's manifest names is verified.
        hub_options: as of `huggingface_hub.hf_hub_download`: revision, token, cache_dir, …

    Raises:
        CheckpointError: none of these, or damaged.
        StorageError: the store or the hub does not answer, or has nothing of that name.
    """
    url = _locate(name, hub_options)
    checkpoint = checkpoint_of(url)
    if checkpoint is not None:
        url = storage.join(checkpoint, EMA if PurePosixPath(url).name == EMA else "model")
    weights, facts = read_model(url)
    run, card, codec = _run_of(url, checkpoint), storage.join(url, _CARD), storage.join(url, CODEC_FILE)
    return Kept(
        url,
        checkpoint,
        run,
        weights,
        facts,
        storage.read_text(card) if storage.exists(card) else None,
        codec if storage.exists(codec) else _codec_of_run(run, facts),
    )


def _locate(name: str, hub_options: dict[str, Any]) -> str:
    """Return the URL at which `read_model` finds what a name stands for."""
    if "://" not in name and not Path(name).exists():
        if not hub.is_repo_id(name):
            raise CheckpointError(f"{name}: no such folder, and no id of a repo on the hub")
        config = hub.find_file(name, _CONFIG, **hub_options)
        if config is None:
            raise CheckpointError(
                f"{name}: no such folder here, and no {_CONFIG} in that repo of the hub (offline: its cache)"
            )
        # all of one commit, whatever is pushed meanwhile
        options = hub_options | {"revision": config.parent.name}
        for file in (_WEIGHTS, _CARD, CODEC_FILE):
            if hub.find_file(name, file, **options) is None and file == _WEIGHTS:
                raise CheckpointError(f"{name}: no {_WEIGHTS} in that repo of the hub (offline: its cache)")
        return str(config.parent)
    inner = storage.join(name, "model")
    if storage.exists(storage.join(name, run_folder.RESULT)) and storage.exists(storage.join(inner, _CONFIG)):
        return inner  # a fine-tuning run
    return name


def _run_of(url: str, checkpoint: str | None) -> str | None:
    """Return the folder of the run that a model lies in; None for a bare model."""
    if checkpoint is not None:
        return checkpoint.rpartition("/")[0].removesuffix(f"/{CHECKPOINTS}")
    url = os.path.abspath(storage.local_path(url)) if storage.is_local(url) else url.rstrip("/")
    parent, _, last = url.rpartition("/")
    return parent if last == "model" and storage.exists(storage.join(parent, run_folder.RESULT)) else None


def _codec_of_run(run: str | None, facts: dict[str, Any]) -> str | None:
    """Return the codec beside the tokens that a run was trained on, if it can be read there and is the model's."""
    tokens = _inner(None if run is None else run_folder.read_config_at(run), "data", "url")
    if not isinstance(tokens, str) or _inner(facts, "codec", "name") == PUBLISHED_NAME:  # those lie beside no tokens
        return None
    codec = storage.join(tokens, CODEC_FILE)
    try:
        is_its_own = storage.exists(codec) and _is_codec_of(codec, facts)
    except StorageError as failure:  # the model is good for streams without it
        say(f"{failure}; going on without the model's codec")
        return None
    return codec if is_its_own else None


def _is_codec_of(url: str, facts: dict[str, Any]) -> bool:
    return codec_fingerprint_of(url) == _inner(facts, "codec", "fingerprint")


def _inner(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def codec_fingerprint_of(url: str) -> str:
    """Return the fingerprint that a saved codec names as its own. Raises CheckpointError: it is not a saved codec."""
    try:
        length = int.from_bytes(storage.read_start(url, 8), "little")
        header = json.loads(storage.read_start(url, 8 + min(length, 1 << 24))[8:])
        return str(json.loads(header["__metadata__"]["codec"])["fingerprint"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{url}: not a codec this package saved") from None


def describe_run(kept: Kept) -> RunFacts:
    """Return what is known of the run that a model came from: its config, and numbers of just these weights."""
    if kept.run is None:
        return RunFacts()
    config = run_folder.read_config_at(kept.run) or {}
    if kept.checkpoint is None:
        return RunFacts(config, result=_read_result(storage.join(kept.run, run_folder.RESULT)))
    manifest = manifests.read_manifest(kept.checkpoint)
    numbers = {} if manifest.valid_loss is None else {"valid/loss": manifest.valid_loss}
    if storage.is_local(kept.run):
        for row in read_metrics(storage.local_path(kept.run) / "metrics.jsonl"):
            if row["step"] == manifest.step:
                numbers |= {key: value for key, value in row.items() if key.startswith("valid/")}
    return RunFacts(config, manifest.step, manifest.consumed_samples, numbers)


def _read_result(place: str) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.read_text(place)))
    except (ValueError, TypeError):
        raise DataError(f"{place}: broken") from None


class Pretrained(ModelHubMixin):
    """What both models share; huggingface_hub's mixin does the rest, `push_to_hub` among it."""

    facts: dict[str, Any] | None = None  # config.json
    card: str = ""
    codec_url: str | None = None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Return the model, on the CPU and in evaluation mode.

        Args:
            pretrained_model_name_or_path: as `read_kept` says.
            force_download, token, cache_dir, local_files_only, revision: of a repo on the hub, as everywhere there.

        Raises:
            CheckpointError, StorageError: as `read_kept`, or it holds another kind of model.
        """
        options = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
        name = str(pretrained_model_name_or_path)
        return cls.from_kept(read_kept(name, **options, local_files_only=local_files_only, revision=revision))

    @classmethod
    def from_kept(cls, kept: Kept) -> Self:
        """Return the model that was read. Raises CheckpointError: it is of another kind, or its files don't agree."""
        model = cls._build(kept)
        model.facts, model.codec_url = kept.facts, kept.codec_url
        model.card = kept.card or model_card(kept.facts, describe_run(kept), kept.codec_url is not None)
        return model

    @classmethod
    @abstractmethod
    def _build(cls, kept: Kept) -> Self:
        """Return the module with its weights. Raises CheckpointError: it is of another kind, or its files don't agree."""

    @property
    def codec(self) -> CodecFacts:
        """Return the codec whose tokens the model understands."""
        assert self.facts is not None, "a model that was read has its facts"
        return CodecFacts(**self.facts["codec"])

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        if self.facts is None:
            raise CheckpointError(
                f"{save_directory}: this model was not read by from_pretrained, so what config.json says is not known; "
                "set its `facts` first (megascale.tasks.pretrain.model_facts makes them)"
            )
        weights = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        codec = None if self.codec_url is None else storage.read_bytes(self.codec_url)
        beside, replaces = save_directory / CODEC_FILE, (save_directory / _WEIGHTS).exists()
        write_model(save_directory, weights, self.facts)
        # whatever lay there was another model's: the mixin would keep its card
        storage.publish_bytes(str(save_directory / _CARD), str(self.generate_model_card()).encode())
        if codec is not None:
            storage.publish_bytes(str(beside), codec)
        elif replaces and beside.exists() and not _is_codec_of(str(beside), self.facts):
            beside.unlink()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the card: that of the model's run, or the one it was exported with."""
        return ModelCard(self.card or model_card(self.facts or {}, RunFacts(), self.codec_url is not None))


class MegaAudioFormer(Pretrained, mega_audioformer.MegaAudioFormer):
    """Both encoders and the masked-token objective, with from_pretrained, save_pretrained and push_to_hub."""

    @classmethod
    def _build(cls, kept: Kept) -> Self:
        if "classes" in kept.facts:
            raise CheckpointError(f"{kept.url}: a classifier; AudioClassifier.from_pretrained reads it")
        return _load(cls(*_sizes(kept), torch_generator(0, "model weights")), kept)


class AudioClassifier(Pretrained, mega_audioformer.AudioClassifier):
    """The global encoder, pooling over frames, one linear layer, with from_pretrained, save_pretrained and push_to_hub.

    `classes` names the columns of its logits.
    """

    @classmethod
    def _build(cls, kept: Kept) -> Self:
        if "classes" not in kept.facts:
            raise CheckpointError(
                f"{kept.url}: no classifier; MegaAudioFormer.from_pretrained reads a pretrained model"
            )
        pooling = kept.facts.get("pooling", "mean")  # older models lack it
        if pooling not in get_args(Pooling):
            raise CheckpointError(f"{kept.url}: {_CONFIG} tells of pooling={pooling!r}, which is not known here")
        generator = torch_generator(0, "model weights")
        return _load(cls(*_sizes(kept), len(kept.facts["classes"]), generator, pooling), kept)

    @property
    def classes(self) -> list[str]:
        return [] if self.facts is None else self.facts["classes"]


def load_model(name: str, **hub_options: Any) -> MegaAudioFormer | AudioClassifier:
    """Read a model of either kind, as `from_pretrained` does."""
    kept = read_kept(name, **hub_options)
    if "classes" in kept.facts:
        return AudioClassifier.from_kept(kept)
    return MegaAudioFormer.from_kept(kept)


def _sizes(kept: Kept) -> tuple[ModelConfig, int]:
    try:
        CodecFacts.model_validate(kept.facts["codec"])
        return ModelConfig(**kept.facts["model"]), int(kept.facts["num_codebooks"])
    except (KeyError, TypeError, ValueError) as failure:
        raise CheckpointError(
            f"{kept.url}: {_CONFIG} does not describe a model: {' '.join(str(failure).split())}"
        ) from None


def _load(model: Any, kept: Kept) -> Any:
    try:
        model.load_state_dict(kept.weights)
    except RuntimeError as failure:
        raise CheckpointError(f"{kept.url}: {str(failure).splitlines()[-1].strip()}") from None
    return model.eval()


@torch.inference_mode()
def embed_clips(encoder: GlobalEncoder, clips: Sequence[StoredClip], batch: int = 16) -> np.ndarray:
    """Return each clip's mean over frames of the global encoder, (N, D) float32: what a classifier's last layer sees.

    (With `head.pooling=mean_std`, the first half of that.) Clips of like length share a forward pass, as they do when
    fine-tuning scores.
    """
    device = next(encoder.parameters()).device
    order = sorted(range(len(clips)), key=lambda i: (clips[i].codes_QT.shape[1], i))
    embedded_ND = np.empty((len(clips), encoder.config.width), dtype=np.float32)
    for i in range(0, len(order), batch):
        chosen = order[i : i + batch]
        rows = [(clips[c].codes_QT.T, np.arange(clips[c].codes_QT.shape[1])) for c in chosen]
        inputs = {name: value.to(device) for name, value in collate(rows).items()}
        valid_BT = inputs.pop("valid_BT", None)
        x_BTD = encoder(inputs["codes_BTQ"], None, inputs["positions_BT"], valid_BT)
        embedded_ND[chosen] = mean_over_frames(x_BTD, valid_BT).float().cpu().numpy()
    return embedded_ND
