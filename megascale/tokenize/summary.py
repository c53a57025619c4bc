"""What a tokenization ends with in numbers: what was made and how fast, what was left out and why, which codes are used.

Q codebooks, V codes of a codebook, T frames.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy.special import entr

from megascale.data.index import Manifest, Quarantined, read_clips
from megascale.tokens import CODEBOOK_SIZE

REPORT = "tokenize_report.json"
STAGES = ("read", "decode", "resample", "encode", "write")
_SAMPLE_SHARDS = 16  # 44 hours of audio at the default sizes, counted in seconds however large the corpus is
_MOST_REASONS = 20


def summarise(
    url: str, manifest: Manifest, bad: list[Quarantined], spent: Mapping[str, float], wall_seconds: float
) -> dict[str, Any]:
    """Return what `tokenize_report.json` holds.

    Args:
        url: the token folder; its shards are committed.
        manifest: of it.
        bad: every quarantined clip.
        spent: of what this start encoded itself: seconds of audio, and seconds that workers spent in each stage.
        wall_seconds: that this start took.
    """
    encoded = spent.get("audio", 0.0)
    report = {
        "clips": manifest.num_clips,
        "hours": manifest.seconds / 3600,
        "quarantined": manifest.num_quarantined,
        "quarantined_because": count_reasons(bad),
        "codec": manifest.codec.origin,
        # an earlier start's shards took none of this start's time
        "encoded_hours": encoded / 3600,
        "wall_seconds": wall_seconds,
        "hours_of_audio_per_hour": encoded / max(wall_seconds, 1e-9),
        # share of the workers' encoding time in which the encoder waited for clips
        "encoder_idle": _share(spent.get("idle", 0.0), spent.get("encode", 0.0)),
        # seconds of audio per second that one worker spent in each stage; readers work side by side
        "real_time_factor": {stage: encoded / spent[stage] for stage in STAGES if spent.get(stage)},
        "codebooks": measure_codebooks(url, manifest),
    }
    if spent.get("checked"):
        shares = {"codebook_0": spent["changed_q0"] / spent["checked"], "all": spent["changed"] / spent["checked"]}
        report["codes_changed"] = shares
    return report


def _share(part: float, rest: float) -> float:
    return part / (part + rest) if part + rest else 0.0


def count_reasons(bad: Iterable[Quarantined]) -> dict[str, int]:
    """Count the reasons of quarantine, the most frequent first; without the URL and the numbers, which differ by clip."""
    reasons = Counter(re.sub(r"\d+(\.\d+)?", "…", item.reason.removeprefix(f"{item.url}: ")) for item in bad)
    counted = dict(reasons.most_common(_MOST_REASONS))
    rest = reasons.total() - sum(counted.values())
    return counted | ({"other reasons": rest} if rest else {})


def measure_codebooks(url: str, manifest: Manifest) -> dict[str, Any]:
    """Measure how evenly the codes of each codebook are used, from an evenly spaced sample of the stored shards.

    Returns:
        `shards` and `clips` that were counted; for each codebook its `usage`, the share of the V codes that occur, and
        its `perplexity`, the number of codes that would be used if all were equally frequent.

    Raises:
        DataError, TokenError: a shard is not what its index says.
    """
    filled = [shard for shard in manifest.shards if shard.clips]
    places = np.linspace(0, len(filled) - 1, min(len(filled), _SAMPLE_SHARDS)).round().astype(int)
    shards = [filled[i] for i in places]
    num_codebooks = manifest.codec.num_codebooks
    count_QV = np.zeros((num_codebooks, CODEBOOK_SIZE), dtype=np.int64)
    for clip in read_clips(url, manifest.model_copy(update={"shards": shards}), num_codebooks):
        for count_V, codes_T in zip(count_QV, clip.codes_QT, strict=True):
            count_V += np.bincount(codes_T, minlength=CODEBOOK_SIZE)
    share_QV = count_QV / count_QV.sum(axis=1, keepdims=True)
    return {
        "shards": len(shards),
        "clips": sum(shard.clips for shard in shards),
        "usage": (count_QV > 0).mean(axis=1).tolist(),
        "perplexity": np.exp(entr(share_QV).sum(axis=1)).tolist(),
    }
