"""How sure a mean accuracy is, and how that is shown.

Two things make it unsure: which recordings are tested, and the seed. Wilson's interval of the mean over as many recordings
as one seed tests holds the first, Student's t over seeds the second. They are taken as independent errors: on each side
the squares of their half-widths add up. So it is never narrower than either; and where seeds draw the split, so that the
spread over seeds holds some of the first, too, it is rather too wide.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

INTERVAL_TEXT = (
    "95% interval in brackets: Wilson's over test recordings and Student's t over seeds, as independent errors"
)
_MARKS = {"above": " ▲", "below": " ▼"}


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean accuracy, its 95% interval (`accuracy_ci95`), mean macro-F1 and the count of tested recordings, given
    the scores of each seed."""
    return {
        "accuracy": float(np.mean([r["accuracy"] for r in results])),
        "accuracy_ci95": list(interval(results)),
        "macro_f1": float(np.mean([r["macro_f1"] for r in results])),
        "count": results[0]["count"],
    }


def interval(results: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the 95% interval of the mean accuracy, given the scores of each seed."""
    accuracies = [r["accuracy"] for r in results]
    mean, over_seeds = float(np.mean(accuracies)), _student(accuracies)
    low, high = _wilson(mean, min(r["count"] for r in results))
    below, above = np.hypot(mean - low, over_seeds), np.hypot(high - mean, over_seeds)
    return max(0.0, mean - float(below)), min(1.0, mean + float(above))


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` recordings. (Wilson 1927)"""
    z = NormalDist().inv_cdf(0.975)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return float(middle - half), float(middle + half)


def _student(values: Sequence[float]) -> float:
    """Return the half-width of the 95% interval of a mean; 0 for one value, which tells nothing of the spread."""
    if len(values) == 1:
        return 0.0
    import scipy.stats  # takes half a second, and pages only show what this returned

    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def with_interval(cell: dict[str, Any], digits: int = 1) -> str:
    """Return a mean accuracy (`accuracy`, `accuracy_ci95`) with its 95% interval in percent, and ▲ or ▼ where
    `against_paper` says that the interval lies above or below the paper's figure."""
    low, high = cell["accuracy_ci95"]
    mark = _MARKS.get(cell.get("against_paper") or "", "")
    return f"{100 * cell['accuracy']:.{digits}f} [{100 * low:.0f}, {100 * high:.0f}]{mark}"
