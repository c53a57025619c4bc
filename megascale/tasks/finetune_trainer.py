"""Training of one classifier: the parts of a run, model choice on validation, and scores on test.

B batch, N windows, R recordings, C classes.
"""

import copy
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.data.loader import Batch
from megascale.downstream.protocols import SURE
from megascale.downstream.scores import average_windows, score, score_labels
from megascale.log import MetricLog
from megascale.model.mega_audioformer import AudioClassifier
from megascale.tasks.finetune_config import FinetuneConfig
from megascale.tasks.finetune_data import Batches, LabelledClips
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
        self._best_epoch = self._last_epoch = 0
        self._engine: Engine

    def fit(self, quiet: bool) -> None:
        """Train the classifier alone, all of the model, or one after the other; keep the weights best on validation."""
        log = MetricLog(self._path / "metrics.jsonl")
        epochs = self._config.train.epochs
        frozen = self._config.train.frozen_epochs if self._config.arm in ("ft", "ft_aug") else 0
        if self._config.arm == "probe":
            self._train(self._frozen_copy(), 0, epochs, log, quiet)
        elif not frozen:
            self._train(self._model, 0, epochs, log, quiet)
        else:
            self._train(self._frozen_copy(), 0, frozen, log, quiet)
            head = {name: value for name, value in self._engine.full_weights().items() if name.startswith("head.")}
            self._model.load_state_dict(head, strict=False)
            self._train(self._model, frozen, epochs, log, quiet)
        log.close()

    def _frozen_copy(self) -> AudioClassifier:
        """Return a copy whose encoder does not learn; DeepSpeed would round the original's weights in bf16."""
        model = copy.deepcopy(self._model)
        model.global_encoder.requires_grad_(False)
        return model

    def _train(self, model: AudioClassifier, first_epoch: int, end_epoch: int, log: MetricLog, quiet: bool) -> None:
        start, stop = (epoch * self._batches.per_epoch for epoch in (first_epoch, end_epoch))
        config, layers = self._config, model.global_encoder.config.layers
        decay = config.optim.layer_decay if config.arm in ("ft", "ft_aug") else 1.0
        self._engine = Engine(
            model,
            config.optim,
            config.zero,
            self._batches.size,
            1,
            stop - start,
            first_step=start,
            rate_share=lambda name: rate_share(name, layers, decay),
        )
        fit(
            self._engine,
            self._batches.train(first_epoch, end_epoch - first_epoch),
            _labels_loss if self._multi else _class_loss,
            Hooks(_summarise, self._validate, None, _note, enough=self._enough(first_epoch, end_epoch)),
            log,
            title="" if quiet else f"fine-tuning {config.arm}",
            start=start,
            num_steps=stop,
            log_every=self._batches.per_epoch,
            validate_every=self._batches.per_epoch,
            save_every=stop,
        )

    def _enough(self, first_epoch: int, end_epoch: int) -> Callable[[], bool] | None:
        patience = self._config.train.patience
        if patience is None or end_epoch < self._config.train.epochs:  # what is only begun goes on with the whole model
            return None
        return lambda: self._last_epoch - max(self._best_epoch, first_epoch) >= patience

    def _validate(self, steps: int) -> dict[str, float]:
        probabilities_NC, targets_N, recordings = self._predict(self._data.splits["valid"])
        probabilities_RC, targets_R, _ = average_windows(probabilities_NC, targets_N, recordings)
        if self._multi:
            name, merit = "map", score_labels(targets_R, probabilities_RC, self._data.classes)["map"]
            sure_RC = np.where(targets_R > 0, probabilities_RC, 1 - probabilities_RC)
        else:
            name, merit = "acc", float((probabilities_RC.argmax(axis=1) == targets_R).mean())
            sure_RC = probabilities_RC[np.arange(len(targets_R)), targets_R]
        loss = float(-np.log(np.maximum(sure_RC, _TINY)).mean())
        self._last_epoch = steps // self._batches.per_epoch
        if self._best is None or (merit, -loss) > self._best:
            self._best, self._best_epoch = (merit, -loss), self._last_epoch
            self.best_weights = {k: v.detach().clone() for k, v in self._engine.module.state_dict().items()}
        return {"valid/loss": loss, f"valid/{name}": merit}

    def _predict(self, members: list[int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return probabilities_NC and targets of each window, and the recordings they are of."""
        clips: list[int] = []
        parts = []
        for chosen, batch in self._batches.whole(members):
            logits_BC = self._engine.evaluate(batch).float()
            parts.append((logits_BC.sigmoid() if self._multi else logits_BC.softmax(dim=-1)).cpu().numpy())
            clips += chosen
        return np.concatenate(parts), self._batches.targets[clips], [self._data.clips[i].recording for i in clips]

    def test(self) -> tuple[dict[str, Any], str]:
        """Score the chosen weights on the test split, by recording and (`clip`) by window.

        Returns:
            The result, and predictions.csv, one line a recording.
        """
        assert self._best is not None, "training validates at least once"
        self._engine.module.load_state_dict(self.best_weights)
        probabilities_NC, targets_N, recordings = self._predict(self._data.splits["test"])
        probabilities_RC, targets_R, names = average_windows(probabilities_NC, targets_N, recordings)
        result = self._score(targets_R, probabilities_RC)
        clip = self._score(targets_N, probabilities_NC)
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
