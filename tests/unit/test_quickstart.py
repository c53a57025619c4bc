"""The quickstart's decisions: whose audio it is, what becomes a class, and what the scores are said to mean."""

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from rich.console import Console
from support import FINGERPRINT, tone

from megascale import quickstart, quickstart_report, run_folder, storage
from megascale.data.index import MANIFEST, CodecFacts, Manifest, ShardFacts
from megascale.downstream.protocols import TaskConfig
from megascale.downstream.table1 import LabelledTokens
from megascale.downstream.table1_config import ARMS, BITRATES_KBPS
from megascale.errors import AudioError, DataError, QuarantineExceeded, StorageError
from megascale.quickstart import QuickstartConfig
from megascale.table_baselines import LOG_MEL, bag_of_codes, score_baselines
from megascale.tokenize import audio
from megascale.tokenize.clips import ClipsConfig, Recording, cut
from megascale.tokenize.shards import EncodedClip, build_shard, plan_shards, publish_shard
from megascale.tokenize.sources import SourceConfig, list_recordings
from megascale.tokens import model_name


def write_files(folder: Path, counts: dict[str, int], seconds: float = 0.25) -> None:
    for name, count in counts.items():
        for i in range(count):
            path = folder / name / f"{i:02d}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            pitch_hz = 200 + 100 * len(name)
            soundfile.write(path, tone(seconds, 24_000, pitch_hz, seed=i), 24_000)


def write_tokens(folder: Path, source: SourceConfig, cuts: ClipsConfig, broken: tuple[str, ...] = ()) -> str:
    """Commit a token folder of a source: codes 0; a clip `SOURCE@SECONDS`, or all of `SOURCE`, named broken is left out."""

    def seconds(recording: Recording) -> float:
        return soundfile.info(recording.url).duration

    clips = [clip for r in list_recordings(source)[0] for clip in cut(r, seconds(r), cuts)]
    kept = [c for c in clips if c.source not in broken and f"{c.source}@{c.start_seconds:g}" not in broken]
    name = model_name(FINGERPRINT, published=False)
    encoded = [EncodedClip(c, np.zeros((2, 75), dtype=np.int16), 24_000) for c in kept]
    data, index = build_shard(plan_shards(kept, 1000)[0], encoded, [], name, FINGERPRINT)
    publish_shard(str(folder), data, index)
    manifest = Manifest(
        codec=CodecFacts(name=name, fingerprint=FINGERPRINT, origin="test", num_codebooks=2),
        source=source.model_dump(mode="json"),
        cut=cuts.model_dump(mode="json"),
        environment={},
        shards=[ShardFacts(name=index.shard, clips=len(kept), sha256=index.sha256, size=index.size)],
        num_clips=len(kept),
        num_quarantined=len(clips) - len(kept),
        seconds=float(len(kept)),
    )
    storage.publish_bytes(str(folder / MANIFEST), manifest.model_dump_json().encode())
    return str(folder)


def own(data: Path) -> SourceConfig:
    return quickstart._own_sources(str(data))["pretrain"]


# -------------------------------------------------------------------------------------------------------- the audio


@pytest.mark.parametrize("spelled", ["loose", "./loose", "loose/", "../here/loose", "file://{here}/loose"])
def test_folder_is_the_same_audio_however_it_is_spelled(tmp_path, monkeypatch, spelled):
    here = tmp_path / "here"
    write_files(here / "loose", {"a": 1})
    monkeypatch.chdir(here)
    output = {"url": str(tmp_path / "out")}
    first = quickstart._with_absolute_data(QuickstartConfig(data=str(here / "loose"), output=output))
    run_folder.write_config(quickstart._folder(first), first)
    again = quickstart._with_absolute_data(QuickstartConfig(data=spelled.format(here=here), output=output))
    assert quickstart._folder(again) == tmp_path / "out"
    run_folder.check_config(tmp_path / "out", again, "quickstart", ())


def test_audio_in_a_store_keeps_its_url():
    config = QuickstartConfig(data="s3://bucket/sounds")
    assert quickstart._with_absolute_data(config) == config


def test_other_audio_goes_beside(tmp_path):
    output = {"url": str(tmp_path / "out")}
    run_folder.write_config(tmp_path / "out", QuickstartConfig(output=output))
    assert quickstart._folder(QuickstartConfig(data="/x/sounds", output=output)) == tmp_path / "out-sounds"


def test_wrong_folder_writes_nothing(tmp_path):
    with pytest.raises(StorageError, match="no such folder"):
        quickstart.run(QuickstartConfig(data=str(tmp_path / "gone"), output={"url": str(tmp_path / "out")}))
    assert list(tmp_path.iterdir()) == []


def test_config_is_written_before_anything_is_rendered(tmp_path, monkeypatch):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "write_corpora", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quickstart.run(QuickstartConfig(output={"url": str(tmp_path)}))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["config.yaml"]


def test_finished_quickstart_with_too_much_quarantined_ends_like_the_first_time(tmp_path):
    config = QuickstartConfig(output={"url": str(tmp_path)})
    run_folder.write_config(tmp_path, config)
    (tmp_path / "summary.json").write_text('{"too_many_quarantined": "5 of 9 clips quarantined"}')
    with pytest.raises(QuarantineExceeded, match="5 of 9"):
        quickstart.run(config)


# ------------------------------------------------------------------------------------------------------ the classes


def test_classes_are_the_folders_with_enough_recordings_that_could_be_read(tmp_path):
    data = tmp_path / "data"
    write_files(data, {".": 1, "low": 5, "deep/high": 6, "few": 4, "broken": 6})
    gone = ("broken/00.wav", "broken/01.wav", "low/00.wav@0")
    url = write_tokens(tmp_path / "tokens", own(data), ClipsConfig(seconds=0.125, min_seconds=0), gone)
    classes, small = quickstart._classes_by_folder(url)
    assert classes == {"high": 6, "low": 5}, "a recording counts once, and if one of its windows could be read"
    assert small == {"broken": 4, "data": 1, "few": 4}
    rows, _ = quickstart._rows(QuickstartConfig(data=str(data)), {"pretrain": url})
    assert [row.task.classes for row in rows] == [["high", "low"]]


@pytest.mark.parametrize("counts", [{".": 9}, {"low": 4, "high": 4}, {"low": 9, "high": 4}])
def test_fewer_than_two_classes_is_nothing_to_classify_and_said_so(tmp_path, capsys, counts):
    write_files(tmp_path / "data", counts)
    url = write_tokens(tmp_path / "tokens", own(tmp_path / "data"), ClipsConfig(seconds=None))
    rows, _ = quickstart._rows(QuickstartConfig(data=str(tmp_path / "data")), {"pretrain": url})
    assert rows == []
    assert "nothing was classified" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the baselines


def test_baselines_read_what_was_tokenised_and_no_more(tmp_path, monkeypatch):
    data = tmp_path / "data"
    write_files(data, {"low": 5, "highest": 5, "few": 1}, seconds=0.5)
    cuts = ClipsConfig(seconds=0.25)
    url = write_tokens(tmp_path / "tokens", own(data), cuts, ("low/00.wav@0.25",))
    read: list[tuple[str, float, float | None]] = []
    real = audio.read_clip

    def watched(url: str, start: float, length: float | None) -> np.ndarray:
        read.append((os.path.relpath(url, data), start, length))
        if (read[-1][0], start) == ("low/00.wav", 0.25):
            raise AudioError("this window was quarantined")
        return real(url, start, length)

    monkeypatch.setattr(audio, "read_clip", watched)
    task = TaskConfig(label="class", classes=["highest", "low"], protocol="stratified", valid_share=0.2, test_share=0.2)
    found = score_baselines(LabelledTokens("folders", url, task), [0], (1.5,))
    assert sorted(read) == sorted(
        (f"{name}/{i:02d}.wav", start, 0.25)
        for name in ("low", "highest")
        for i in range(5)
        for start in (0.0, 0.25)
        if (name, i, start) != ("low", 0, 0.25)
    )
    assert found[LOG_MEL]["count"] == 2
    assert found["chance"]["accuracy"] == 0.5
    assert found[bag_of_codes(1.5)]["bitrate_kbps"] == 1.5
    assert found[bag_of_codes(1.5)]["count"] == 2


def test_recording_that_is_gone_is_told(tmp_path):
    write_files(tmp_path / "data", {"low": 5, "high": 5})
    url = write_tokens(tmp_path / "tokens", own(tmp_path / "data"), ClipsConfig(seconds=None))
    (tmp_path / "data" / "low" / "03.wav").unlink()
    task = TaskConfig(label="class", protocol="stratified", valid_share=0.2, test_share=0.2)
    with pytest.raises(DataError, match=r"low/03.wav: was tokenised, and is no longer"):
        score_baselines(LabelledTokens("folders", url, task), [0], (1.5,))


# --------------------------------------------------------------------------------------------------- what is told


@pytest.mark.parametrize(
    ("means", "told"),
    [
        ((0.5, 0.6, 0.7), ("ft is above scratch in the mean (+10.0 points)", "70.0%, is above the log-mel", "65.0%")),
        ((0.5, 0.5, 0.4), ("ft is NOT above scratch", "ft_aug is NOT above scratch", "50.0%, is NOT above")),
    ],
)
def test_verdict_says_whether_pretraining_helped(means, told):
    found = {"a": {LOG_MEL: {"accuracy": 0.6}}, "b": {LOG_MEL: {"accuracy": 0.7}}}
    verdict = quickstart_report.verdict(dict(zip(ARMS, means, strict=True)), found)
    for words in told:
        assert words in verdict


def test_terminal_table_has_a_row_per_arm_and_baseline():
    cells = [
        {
            "task": "genres",
            "arm": arm,
            "bitrate_kbps": kbps,
            "accuracy": 0.1 * i + kbps / 100,
            "macro_f1": 0.5,
            "count": 7,
        }
        for i, arm in enumerate(ARMS)
        for kbps in BITRATES_KBPS
    ]
    found = {
        LOG_MEL: {"accuracy": 0.25, "macro_f1": 0.2, "count": 7},
        "bag": {"accuracy": 0.35, "macro_f1": 0.3, "count": 7, "bitrate_kbps": 12.0},
    }
    summary = {"cells": cells, "baselines": {"genres": found}}
    out = io.StringIO()
    Console(file=out, width=80).print(quickstart_report.terminal_table(summary))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]
    assert rows == [
        ["genres", "scratch", "1.5 (50.0)", "12.0 (50.0)", "7"],
        ["genres", "ft", "11.5 (50.0)", "22.0 (50.0)", "7"],
        ["genres", "ft_aug", "21.5 (50.0)", "32.0 (50.0)", "7"],
        ["genres", LOG_MEL, "25.0 (20.0)", "25.0 (20.0)", "7"],
        ["genres", "bag", "", "35.0 (30.0)", "7"],
    ]
    numbers = [line.split("│")[3] for line in out.getvalue().splitlines() if "│" in line]
    assert all(cell.endswith(") ") for cell in numbers[:3]), "numbers are flush right"


def test_launcher_ends_when_the_quickstart_is_killed():
    code = "import os; from megascale.quickstart import _run_group; _run_group(['sleep', '1000'], dict(os.environ))"
    parent = psutil.Popen([sys.executable, "-c", code])
    while not (children := parent.children()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
