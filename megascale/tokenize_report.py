"""The page of a token folder: what was made, what was left out, where the time went, how the codes are used, and a few
clips with their tokens.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megascale import report, storage
from megascale.data.index import Manifest, Member, ShardFacts, read_codes, read_index, read_manifest
from megascale.errors import AudioError, StorageError
from megascale.log import duration, say
from megascale.spectrogram import log_mel
from megascale.tokenize import audio
from megascale.tokenize.clips import Clip
from megascale.tokenize.plan import TokenizeConfig, read_plan
from megascale.tokenize.summary import REPORT
from megascale.tokens import CODEBOOK_SIZE, FRAMES_PER_SECOND, KBPS_PER_CODEBOOK

_EXAMPLES, _TRIES = 4, 12  # clips shown, and clips whose audio is asked for
_EXAMPLE_SECONDS = 10.0
_EXAMPLE_CODEBOOKS = 8
_READING = ["read", "decode", "resample"]
_MOST_IDLE = 0.1  # share of the time that an encoder waits which is nobody's fault
_HINTS = {
    "read": ("reading the audio", "Workers nearer to the store, or more of them, would help."),
    "decode": ("decoding", "More workers would help, and so would audio in a format that decodes faster."),
    "resample": ("resampling", "More workers would help; audio stored at 24 kHz needs none of it."),
    "encode": ("the encoder", "More workers would help, and so would GPUs (workers.gpus_each)."),
}


def write_page(config: TokenizeConfig) -> None:
    """Write `report.html` into a finished token folder, unless the page of this finish is there already."""
    url = config.output.url
    facts = storage.read_bytes(storage.join(url, REPORT))
    made_from, where = hashlib.sha256(facts).hexdigest(), storage.join(url, report.PAGE)
    if storage.exists(where) and made_from.encode() in storage.read_bytes(where):
        return
    found, manifest = json.loads(facts), read_manifest(url)
    page = report.Page("Tokens", url)
    page.text(url, note=True)
    _add_contents(page, found, manifest)
    page.heading("Speed")
    _add_speed(page, found)
    page.heading("Codebooks")
    _add_codebooks(page, found["codebooks"])
    page.heading("Audio and tokens")
    _add_examples(page, list(_examples(config, manifest)))
    page.heading("How it was made")
    made_with = ", ".join(f"{key} {value}" for key, value in manifest.environment.items())
    page.text(f"{made_with}. Numbers: {REPORT}, sha256 {made_from}.")
    say(f"report: {page.write()}")


def _add_contents(page: report.Page, found: dict[str, Any], manifest: Manifest) -> None:
    codec = manifest.codec
    size_mb = sum(shard.size for shard in manifest.shards) / 1e6
    total = manifest.num_clips + manifest.num_quarantined
    rows = [
        ["clips", f"{manifest.num_clips:,}"],
        ["audio", f"{found['hours']:,.2f} hours"],
        ["quarantined", f"{found['quarantined']:,} of {total:,} clips ({found['quarantined'] / total:.2%})"],
        ["shards", f"{len(manifest.shards):,} ({size_mb:,.1f} MB)"],
        ["codebooks", f"{codec.num_codebooks} ({KBPS_PER_CODEBOOK * codec.num_codebooks:g} kbps)"],
        ["codec", f"{codec.name}, {codec.origin}"],
    ]
    page.table(["what was made", ""], rows, text_columns=2)
    if found["quarantined_because"]:
        page.heading("Quarantined")
        reasons = [[reason, f"{count:,}"] for reason, count in found["quarantined_because"].items()]
        page.table(["reason", "clips"], reasons)
        page.text("quarantine.jsonl names every clip. In a reason, … stands for a number.", note=True)


def _add_speed(page: report.Page, found: dict[str, Any]) -> None:
    factors = found["real_time_factor"]
    took = duration(found["wall_seconds"])
    if "encode" not in factors:
        page.text(f"Nothing was left to encode; finishing took {took}.")
        return
    page.text(
        f"{found['hours_of_audio_per_hour']:,.1f} hours of audio an hour: the last start encoded "
        f"{found['encoded_hours']:,.2f} hours in {took}, planning and fitting of a codec included."
    )
    slowest, words = bottleneck(factors, found["encoder_idle"])
    page.text(words)
    page.picture("stages", _stages(factors, slowest), "real-time factor of each stage")


def bottleneck(factors: dict[str, float], encoder_idle: float) -> tuple[str, str]:
    """Return the bottleneck, and a sentence that names it, given the real-time factor of each stage and the share of its
    time that the encoder waited.

    It is the encoder unless that waits; the readers work side by side, so their times alone don't tell.
    """
    reading = {stage: factors[stage] for stage in _READING if stage in factors}
    waits = reading and encoder_idle > _MOST_IDLE
    slowest = min(reading, key=lambda stage: reading[stage]) if waits else "encode"
    what, hint = _HINTS[slowest]
    return slowest, (
        f"The bottleneck is {what}, {factors[slowest]:,.1f} times real time in one worker: its encoder waited for clips "
        f"{encoder_idle:.0%} of the time. {hint}"
    )


def _stages(factors: dict[str, float], bottleneck: str) -> Figure:
    figure = Figure(figsize=(7.5, 2.6))
    ax = figure.subplots()
    colors = [report.ORANGE if stage == bottleneck else report.BLUE for stage in factors]
    bars = ax.barh(list(factors), list(factors.values()), color=colors)
    ax.bar_label(bars, [f"{factor:,.1f}x" for factor in factors.values()], padding=4)
    ax.set(xscale="log", xlabel="times real time, in one worker (log scale; orange: the bottleneck)")
    ax.xaxis.set_major_formatter("{x:g}x")
    ax.set_xlim(min(1.0, min(factors.values()) / 2), 4 * max(factors.values()))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _add_codebooks(page: report.Page, found: dict[str, Any]) -> None:
    page.text(
        f"Counted in {found['clips']:,} clips of {found['shards']:,} shards, evenly spaced. Usage: the share of the "
        f"{CODEBOOK_SIZE} codes that occur. Perplexity: how many codes would be in use if all were equally frequent; "
        f"{CODEBOOK_SIZE} is the most."
    )
    page.picture("codebooks", _codebooks(found), "usage and perplexity of each codebook")


def _codebooks(found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, [100 * share for share in found["usage"]], "{:.0f}")
    left.set(ylabel="codes that occur (%)", ylim=(0, 108))
    _bars(right, found["perplexity"], "{:.0f}")
    right.set(ylabel="perplexity", ylim=(0, 1.08 * CODEBOOK_SIZE))
    return figure


def _bars(ax: Axes, heights: list[float], label: str) -> None:
    places = np.arange(len(heights))
    bars = ax.bar(places, heights, color=report.BLUE)
    ax.bar_label(bars, [label.format(height) for height in heights], fontsize=7, padding=1)
    ax.set(xlabel="codebook", xticks=places)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


# ----------------------------------------------------------------------------------------------------------- examples


def _add_examples(page: report.Page, clips: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    if not clips:
        page.text("No recording could be read again, so there are no spectrograms to show.", note=True)
        return
    page.text(
        "Log-mel spectrograms of clips from all over the corpus, and their tokens below: one row a codebook, one column "
        f"a frame, a color a code. At most {_EXAMPLE_SECONDS:g} s and {_EXAMPLE_CODEBOOKS} codebooks of each."
    )
    report.add_clips(page, clips)


def _examples(config: TokenizeConfig, manifest: Manifest) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield title, log-mel spectrogram and codes of a few clips of different recordings that can still be read."""
    url, plan = config.output.url, read_plan(config)
    assert plan is not None, "the job has just read it"
    shown: set[str] = set()
    for number, place in _spread(manifest):
        facts = manifest.shards[number]
        member = read_index(url, facts, manifest.codec.fingerprint).clips[place]
        clip = next(clip for clip in plan.shards[number].clips if clip.key == member.key)
        if clip.recording in shown:
            continue
        try:
            spectrogram_MF = log_mel(_read_start(clip, member))
        except (AudioError, StorageError):
            continue
        shown.add(clip.recording)
        codes_QT = _stored_codes(url, facts, member, manifest)
        frames = spectrogram_MF.shape[1]
        title = f"{PurePosixPath(clip.source).name}, at {clip.start_seconds:g} s"
        yield title, spectrogram_MF, codes_QT[:_EXAMPLE_CODEBOOKS, :frames]
        if len(shown) == _EXAMPLES:
            return


def _spread(manifest: Manifest) -> list[tuple[int, int]]:
    """Return shard and place in it of evenly spaced clips; the first few are as far apart as all of them."""
    ends = np.cumsum([shard.clips for shard in manifest.shards])
    count = min(_TRIES, manifest.num_clips)
    places = np.unique(np.linspace(0, manifest.num_clips - 1, count).round().astype(int))
    stride = max(1, len(places) // _EXAMPLES)
    in_turn = np.concatenate([places[i::stride] for i in range(stride)])
    shards = np.searchsorted(ends, in_turn, side="right")
    return [(int(s), int(i - (ends[s] - manifest.shards[s].clips))) for s, i in zip(shards, in_turn, strict=True)]


def _read_start(clip: Clip, member: Member) -> np.ndarray:
    """Read no more of a long clip than is shown: it may last hours."""
    short = member.frames <= _EXAMPLE_SECONDS * FRAMES_PER_SECOND
    return audio.read_clip(clip.url, clip.start_seconds, clip.duration_seconds if short else _EXAMPLE_SECONDS)


def _stored_codes(url: str, facts: ShardFacts, member: Member, manifest: Manifest) -> np.ndarray:
    where = storage.join(url, facts.name)
    with storage.open_read(where) as file:
        file.seek(member.offset)
        stream = file.read(member.size)
    return read_codes(stream, f"{where}:{member.key}", manifest.codec, manifest.codec.num_codebooks)
