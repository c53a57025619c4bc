"""Training of one classifier: the parts of a run, model choice on validation, and scores on test.

B batch, N windows, R recordings, C classes.
"""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.data.loader import Batch
from megascale.downstream.protocols import SURE
from megascale.downstream.scores import average_windows, score, score_labels
from megascale.log import MetricLog, Progress
from megascale.model.mega_audioformer import AudioClassifier
from megascale.tasks.finetune_config import FinetuneConfig
from megascale.tasks.finetune_data import Batches, LabelledClips
from megascale.tasks.regression_start import STRENGTHS, fit_linear
from megascale.train.engine import Engine
from megascale.train.loop import Hooks, fit

_TINY = 1e-12


class Trainer:
    """One classifier's training, model choice on validation, and test."""

    def __init__(self, config: FinetuneConfig, model: AudioClassifier, data: LabelledClips, path: Path) -> None:
        """`model`: with the arm's first weights. `path`: the run's folder."""
        self._config, self._model, self._data, self._path = config, model, data, path
        self._multi = config.task.kind == "multi"
        self._batches = Batches(config, data)
        self._best: tuple[float, float] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self._best_epoch = self._last_epoch = 0  # 0: before the first update
        self._engine: Engine

    def fit(self, quiet: bool) -> None:
        """Train what the arm lets learn; keep the weights best on validation."""
        config, layers = self._config, self._model.global_encoder.config.layers
        log = MetricLog(self._path / "metrics.jsonl", resume_step=-1)  # a run that was stopped begins again
        strength = self._start_classifier(quiet) if config.head.start == "regression" else None
        if config.arm == "probe":
            self._model.global_encoder.requires_grad_(False)
        decay = config.optim.layer_decay if config.arm in ("ft", "ft_aug") else 1.0
        num_steps = config.train.epochs * self._batches.per_epoch
        self._engine = Engine(
            self._model,
            config.optim,
            config.zero,
            self._batches.size,
            1,
            num_steps,
            rate_share=lambda name: rate_share(name, layers, decay),
        )
        if strength is not None:
            log.write(0, self._validate(0) | {"valid/regression_strength": strength})
        fit(
            self._engine,
            self._batches.train(),
            _labels_loss if self._multi else _class_loss,
            Hooks(_summarise, self._validate, None, _note, enough=self._enough),
            log,
            title="" if quiet else f"fine-tuning {config.arm}",
            start=0,
            num_steps=num_steps,
            log_every=self._batches.per_epoch,
            validate_every=self._batches.per_epoch,
            save_every=num_steps,
        )
        log.close()

    def _enough(self) -> bool:
        patience = self._config.train.patience
        return patience is not None and self._last_epoch - self._best_epoch >= patience

    def _start_classifier(self, quiet: bool) -> float:
        """Set the linear layer by logistic regression on whole windows; return the strength that is best on validation."""
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        train_NK, train_clips = self._pooled("train", quiet)
        valid_NK, valid_clips = self._pooled("valid", quiet)
        targets = torch.from_numpy(self._batches.targets[train_clips]).to(train_NK.device)
        fits = []
        for strength in STRENGTHS:
            weight_CK, bias_C = fit_linear(train_NK, targets, len(self._data.classes), strength)
            rating = self._rate(self._probabilities(F.linear(valid_NK, weight_CK, bias_C)), valid_clips)
            fits.append((rating, strength, {"weight": weight_CK, "bias": bias_C}))
        _, strength, head = max(fits, key=lambda fit: fit[0])
        self._model.head.load_state_dict(head)
        return strength

    @torch.no_grad()
    def _pooled(self, side: str, quiet: bool) -> tuple[Tensor, list[int]]:
        """Return what the linear layer sees of each window of a split, (N, K), and the clips in that order."""
        members = self._data.splits[side]
        progress = Progress("" if quiet else f"features for the regression, {side}", len(members), unit="clips")
        clips: list[int] = []
        parts = []
        for chosen, batch in self._batches.whole(members):
            inputs = {name: value.to(self._model.head.weight.device) for name, value in batch.items()}
            parts.append(self._model.pool(**inputs))
            clips += chosen
            progress.update(len(clips))
        progress.close()
        return torch.cat(parts), clips

    def _validate(self, steps: int) -> dict[str, float]:
        rating = self._rate(*self._predict(self._data.splits["valid"]))
        self._last_epoch = steps // self._batches.per_epoch
        if self._best is None or rating > self._best:
            self._best, self._best_epoch = rating, self._last_epoch
            self.best_weights = {k: v.detach().clone() for k, v in self._engine.module.state_dict().items()}
        return {"valid/loss": -rating[1], "valid/map" if self._multi else "valid/acc": rating[0]}

    def _rate(self, probabilities_NC: np.ndarray, clips: list[int]) -> tuple[float, float]:
        """Return (accuracy or mAP, negative loss) over recordings: greater is better."""
        probabilities_RC, targets_R, _ = self._average(probabilities_NC, clips)
        if self._multi:
            merit = score_labels(targets_R, probabilities_RC, self._data.classes)["map"]
            sure_RC = np.where(targets_R > 0, probabilities_RC, 1 - probabilities_RC)
        else:
            merit = float((probabilities_RC.argmax(axis=1) == targets_R).mean())
            sure_RC = probabilities_RC[np.arange(len(targets_R)), targets_R]
        return merit, float(np.log(np.maximum(sure_RC, _TINY)).mean())

    def _probabilities(self, logits_NC: Tensor) -> np.ndarray:
        logits_NC = logits_NC.float()
        return (logits_NC.sigmoid() if self._multi else logits_NC.softmax(dim=-1)).cpu().numpy()

    def _average(self, probabilities_NC: np.ndarray, clips: list[int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        recordings = [self._data.clips[i].recording for i in clips]
        return average_windows(probabilities_NC, self._batches.targets[clips], recordings)

    def _predict(self, members: list[int]) -> tuple[np.ndarray, list[int]]:
        """Return probabilities_NC of each window, and the clips in that order."""
        clips: list[int] = []
        parts = []
        for chosen, batch in self._batches.whole(members):
            parts.append(self._probabilities(self._engine.evaluate(batch)))
            clips += chosen
        return np.concatenate(parts), clips

    def test(self) -> tuple[dict[str, Any], str]:
        """Score the chosen weights on the test split, by recording and (`clip`) by window.

        Returns:
            The result, and predictions.csv, one line a recording.
        """
        assert self._best is not None, "training validates at least once"
        self._engine.module.load_state_dict(self.best_weights)
        probabilities_NC, clips = self._predict(self._data.splits["test"])
        probabilities_RC, targets_R, names = self._average(probabilities_NC, clips)
        result = self._score(targets_R, probabilities_RC)
        clip = self._score(self._batches.targets[clips], probabilities_NC)
        del clip["classes"]
        merit = "valid_map" if self._multi else "valid_accuracy"
        result |= {"clip": clip, merit: self._best[0], "valid_loss": -self._best[1]}
        result |= {"best_epoch": self._best_epoch, "last_epoch": self._last_epoch}
        return result, self._table(names, targets_R, probabilities_RC)

    def _score(self, targets: np.ndarray, probabilities_NC: np.ndarray) -> dict[str, Any]:
        if self._multi:
            return score_labels(targets, probabilities_NC, self._data.classes)
        return score(targets, probabilities_NC.argmax(axis=1), self._data.classes)

    def _table(self, names: list[str], targets_R: np.ndarray, probabilities_RC: np.ndarray) -> str:
        """Return predictions.csv; several labels stand in one cell, a `;` between them."""
        classes = self._data.classes
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["recording", "labels" if self._multi else "label", "predicted", *classes])
        for name, target, row in zip(names, targets_R, probabilities_RC, strict=True):
            if self._multi:
                told = [
                    ";".join(c for c, has in zip(classes, kept, strict=True) if has) for kept in (target, row >= SURE)
                ]
            else:
                told = [classes[int(target)], classes[int(row.argmax())]]
            writer.writerow([name, *told, *(f"{p:.4f}" for p in row)])
        return out.getvalue()


def rate_share(name: str, num_layers: int, decay: float) -> float:
    """Return the share of the learning rate of a classifier's weight: decay^(layers above it).

    The classifier and the last norm have it all, the last layer `decay` of it, the embeddings decay^(num_layers + 1).
    (Clark et al. 2020, ELECTRA, layerwise learning-rate decay)
    """
    if name.startswith(("head.", "global_encoder.norm.")):
        return 1.0
    if name.startswith("global_encoder.blocks."):
        return decay ** (num_layers - int(name.split(".")[2]))
    return decay ** (num_layers + 1)


def _class_loss(logits_BC: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    targets_B = batch["targets_B"]
    loss = F.cross_entropy(logits_BC.float(), targets_B)
    correct = (logits_BC.argmax(dim=-1) == targets_B).sum()
    return loss, {"loss": loss, "correct": correct, "clips": torch.tensor(float(len(targets_B)), device=loss.device)}


def _labels_loss(logits_BC: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    targets_BC = batch["targets_BC"]
    loss = F.binary_cross_entropy_with_logits(logits_BC.float(), targets_BC)
    return loss, {"loss": loss, "clips": torch.tensor(float(len(targets_BC)), device=loss.device)}


def _summarise(sums: dict[str, Tensor], seconds: float) -> dict[str, float]:
    accuracy = {"train/acc": float(sums["correct"] / sums["clips"])} if "correct" in sums else {}
    return {
        "train/loss": float(sums["loss"] / sums["updates"]),
        **accuracy,
        "train/lr": float(sums["lr"] / sums["updates"]),
        "train/clips_per_second": float(sums["clips"]) / max(seconds, 1e-9),
    }


def _note(metrics: dict[str, float]) -> str:
    accuracy = f"  accuracy {metrics['train/acc']:.3f}" if "train/acc" in metrics else ""
    return f"loss {metrics['train/loss']:.3f}{accuracy}"
