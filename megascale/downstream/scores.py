"""Scores: what counts as good, where a clip has one class and where it has any number of labels.

N windows, R recordings, C classes.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np


def average_windows(
    probabilities_NC: np.ndarray, targets_N: np.ndarray, recordings: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Average the class probabilities of the windows of each recording.

    Args:
        probabilities_NC: of each window.
        targets_N: class numbers (N,), or labels (N, C); windows of a recording have the same.
        recordings: of each window.

    Returns:
        probabilities_RC and targets_R for the R recordings, and their names, in order of first appearance.
    """
    names = list(dict.fromkeys(recordings))
    row_of = {name: i for i, name in enumerate(names)}
    rows_N = np.array([row_of[name] for name in recordings])
    sums_RC = np.zeros((len(names), probabilities_NC.shape[1]))
    np.add.at(sums_RC, rows_N, probabilities_NC)
    targets_R = np.zeros((len(names), *targets_N.shape[1:]), dtype=targets_N.dtype)
    targets_R[rows_N] = targets_N
    return sums_RC / np.bincount(rows_N)[:, None], targets_R, names


def score(targets_R: np.ndarray, predicted_R: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Return accuracy, macro-F1, per-class scores, the confusion matrix (rows: truth) and the count.

    Macro-F1 is the mean over the classes that occur in the test set: NSynth's `synth_lead` has no test clip and would
    otherwise count as a failure of every model. Predictions of an absent class still cost the true one.
    """
    from sklearn import metrics  # takes a second to import

    present = sorted(set(targets_R.tolist()))
    numbers = list(range(len(classes)))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        targets_R, predicted_R, labels=numbers, zero_division=0
    )
    return {
        "accuracy": float((targets_R == predicted_R).mean()),
        "macro_f1": float(metrics.f1_score(targets_R, predicted_R, labels=present, average="macro", zero_division=0)),
        "count": len(targets_R),
        "chance": float(np.bincount(targets_R).max() / len(targets_R)),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "count": int(support[i]),
            }
            for i, name in enumerate(classes)
        },
        "confusion": metrics.confusion_matrix(targets_R, predicted_R, labels=numbers).tolist(),
        "classes": classes,
    }


def pool(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores, as `score` does, of all predictions of several results together, which have the same classes:
    cross-validation, where each recording is tested once."""
    counts_CC = np.sum([result["confusion"] for result in results], axis=0)
    truth, predicted = np.nonzero(counts_CC)
    times = counts_CC[truth, predicted]
    return score(np.repeat(truth, times), np.repeat(predicted, times), results[0]["classes"])


def score_labels(targets_RC: np.ndarray, probabilities_RC: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Return mAP, mean ROC AUC, d', the same per class, and the count, where a clip has any number of labels.

    mAP is the mean over the classes that occur here of each one's average precision; the mean AUC is over those that
    some have and some have not. d' = sqrt(2) x Phi^-1(mean AUC); it has no bound, and is None where the AUC is 1 or 0,
    as the AUC is where no class has both. (Hershey et al. 2017, arXiv:1609.09430, section 3.3)
    """
    from sklearn import metrics  # takes a second to import

    per_class: dict[str, dict[str, Any]] = {}
    for name, target_R, probability_R in zip(classes, targets_RC.T > 0, probabilities_RC.T, strict=True):
        count = int(target_R.sum())
        divided = 0 < count < len(target_R)
        per_class[name] = {
            "ap": float(metrics.average_precision_score(target_R, probability_R)) if count else None,
            "auc": float(metrics.roc_auc_score(target_R, probability_R)) if divided else None,
            "count": count,
        }
    precisions, areas = ([row[key] for row in per_class.values() if row[key] is not None] for key in ("ap", "auc"))
    auc = float(np.mean(areas)) if areas else None
    return {
        "map": float(np.mean(precisions)) if precisions else None,
        "auc": auc,
        "d_prime": math.sqrt(2) * NormalDist().inv_cdf(auc) if auc is not None and 0 < auc < 1 else None,
        "count": len(targets_RC),
        "per_class": per_class,
        "classes": classes,
    }
