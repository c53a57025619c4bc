"""How sure a mean accuracy is, and how that is shown."""

from typing import Any

import numpy as np

_MARKS = {"above": " ▲", "below": " ▼"}


def interval(results: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the 95% interval of the accuracy, given the scores of each seed: Student's t over seeds; Wilson's over the
    test recordings where there is one seed, or where all agree."""
    import scipy.stats  # takes half a second, and pages only show what this returned

    values = [r["accuracy"] for r in results]
    if np.ptp(values) == 0:
        count = results[0]["count"]
        found = scipy.stats.binomtest(round(values[0] * count), count).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return max(0.0, float(np.mean(values) - half)), min(1.0, float(np.mean(values) + half))


def with_interval(cell: dict[str, Any], digits: int = 1) -> str:
    """Return a mean accuracy (`accuracy`, `accuracy_ci95`) with its 95% interval in percent, and ▲ or ▼ where
    `against_paper` says that the interval lies above or below the paper's figure."""
    low, high = cell["accuracy_ci95"]
    mark = _MARKS.get(cell.get("against_paper") or "", "")
    return f"{100 * cell['accuracy']:.{digits}f} [{100 * low:.0f}, {100 * high:.0f}]{mark}"
