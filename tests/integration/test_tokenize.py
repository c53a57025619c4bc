"""The tokenization job on a real local Ray: what is committed, what is quarantined, and what a crash leaves."""

import hashlib
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from conftest import command, run
from support import tone, write_tones

from megascale.data.index import read_clips, read_manifest
from megascale.tokens import read_ecdc, write_ecdc

SMOKE = "configs/tokenize/smoke.yaml"


def tokenize(source: Path | str, output: Path | str, *overrides: str) -> list[str]:
    return command("tokenize_audio.py", SMOKE, f"source.url={source}", f"output.url={output}", *overrides)


def same_codec(folder: Path) -> str:
    """Fitting takes longer than encoding these few clips."""
    return f"codec.weights={folder / 'codec.safetensors'}"


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("tokens-*"))}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenize_report.json").read_text())


def state(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    """Two classes of tones, and what a stranger's folder also holds."""
    folder = tmp_path_factory.mktemp("audio")
    paths = write_tones(folder, 40)
    (folder / "notes.wav").write_text("this is not audio\n" * 20)
    (folder / "nothing.wav").write_bytes(b"")
    (folder / "cut.wav").write_bytes(paths[0].read_bytes()[:20_000])
    soundfile.write(folder / "silent.wav", tone(2, 24_000, 100) * 0, 24_000)
    return folder


@pytest.fixture(scope="module")
def tokens(audio, tmp_path_factory) -> Path:
    """The undisturbed run that others are held against."""
    output = tmp_path_factory.mktemp("tokens") / "out"
    printed = run(tokenize(audio, output, "workers.count=2", "shards.clips=8"))
    assert "41 clips" in printed and "3 quarantined" in printed
    *_, last, page = printed.splitlines()
    assert "next: python launch/pretrain.py" in last and page == f"report: {output / 'report.html'}"
    return output


def test_every_clip_is_either_stored_once_or_quarantined_with_its_reason(tokens):
    manifest = read_manifest(str(tokens))
    clips = list(read_clips(str(tokens), manifest, 2))
    bad = [json.loads(line) for line in (tokens / "quarantine.jsonl").read_text().splitlines()]
    assert len(clips) == len({clip.key for clip in clips}) == manifest.num_clips == 41
    assert "silent.wav" in {clip.source for clip in clips}
    reasons = {Path(item["url"]).name: item["reason"] for item in bad}
    assert sorted(reasons) == ["cut.wav", "notes.wav", "nothing.wav"]
    assert "truncated" in reasons["cut.wav"]
    assert "empty" in reasons["nothing.wav"]
    assert "not an audio file" in reasons["notes.wav"]
    assert all(item["attempts"] >= 1 for item in bad)
    report = report_of(tokens)
    assert (report["clips"], report["quarantined"]) == (41, 3)
    assert report["quarantined_because"]["an empty file"] == 1
    assert report["codebooks"]["clips"] == 41
    assert all(0 < share <= 1 for share in report["codebooks"]["usage"])
    assert report["real_time_factor"].keys() == {"read", "decode", "resample", "encode", "write"}


def test_streams_of_the_same_codec_pass_through_with_every_byte(audio, tokens, tmp_path):
    """Beside audio and a stream of another codec, which is never mixed in."""
    folder = tmp_path / "in"
    folder.mkdir()
    sent = {}
    with tarfile.open(tokens / "tokens-000001.tar") as tar:
        for member in tar:
            if member.name.endswith(".ecdc"):
                sent[member.name] = tar.extractfile(member).read()
                (folder / member.name).write_bytes(sent[member.name])
    codes_QT = read_ecdc(next(iter(sent.values())), "sent")[1]
    (folder / "other.ecdc").write_bytes(write_ecdc(codes_QT, codes_QT.shape[1] * 320, "encodec_24khz"))
    shutil.copy(next(audio.rglob("low-000.wav")), folder / "audio.wav")
    run(tokenize(folder, tmp_path / "out", same_codec(tokens), "quarantine.max_share=0.5"))
    kept = [(place / "codec.safetensors").read_bytes() for place in (tmp_path / "out", tokens)]
    assert kept[0] == kept[1], "what is needed to tokenise for these tokens lies beside them, too"
    stored = {}
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(shard) as tar:
            names = {m.name: tar.extractfile(m).read() for m in tar}
        for name, data in names.items():
            if name.endswith(".json"):
                stored[json.loads(data)["source"]] = names[name.removesuffix(".json") + ".ecdc"]
    assert len(stored.pop("audio.wav")) > 0
    assert stored == sent and len(sent) == 8
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert (
        bad["url"] == str(folder / "other.ecdc") and "codes of encodec_24khz, and this job's codec is" in bad["reason"]
    )


def test_finished_job_rewrites_nothing(audio, tokens):
    before = state(tokens)
    assert "already done" in run(tokenize(audio, tokens, "workers.count=2", "shards.clips=8"))
    assert state(tokens) == before


def test_too_many_quarantined_clips_end_with_3_and_a_page_that_tells_why(audio, tokens, tmp_path):
    out = Path(shutil.copytree(tokens, tmp_path / "out"))
    (out / "report.html").unlink()
    printed = run(tokenize(audio, out, "shards.clips=8", "quarantine.max_share=0.01"), exit_code=3)
    assert "quarantine.jsonl: 3 of 44 clips quarantined" in printed
    assert "an empty file" in (out / "report.html").read_text()


def test_folder_of_another_job_is_refused_and_left_alone(audio, tokens):
    before = state(tokens)
    printed = run(tokenize(audio, tokens, "shards.clips=9"), exit_code=2)
    assert "holds a job with another shards" in printed
    assert state(tokens) == before


@pytest.mark.slow
def test_job_killed_at_any_moment_goes_on_to_the_same_bytes(audio, tokens, tmp_path, start):
    """One worker instead of two; the driver and then a worker are killed with SIGKILL on the way."""
    line = tokenize(audio, tmp_path / "out", "workers.count=1", "shards.clips=8", same_codec(tokens))
    driver = start(line)
    wait_for(lambda: list((tmp_path / "out").glob("tokens-*.json")), driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert 1 <= len(list((tmp_path / "out").glob("tokens-*.json"))) < 6

    driver = start(line)
    worker = wait_for(lambda: worker_of(driver), driver)
    worker.kill()
    assert driver.wait(timeout=200) == 0
    assert "worker died" in driver.stderr.read()
    assert hashes(tmp_path / "out") == hashes(tokens)
    assert report_of(tmp_path / "out")["codebooks"] == report_of(tokens)["codebooks"]


def worker_of(driver) -> psutil.Process | None:
    found = psutil.process_iter(["pid", "cmdline", "ppid"])
    workers = [p for p in found if any("ShardWorker" in part for part in p.info["cmdline"] or [])]
    ours = {p.pid for p in psutil.Process(driver.pid).children(recursive=True)}
    return next((p for p in workers if p.pid in ours), None)


def wait_for(ready, driver, seconds: float = 120, pause: float = 0.02):
    """Poll until something is there; a driver that ends before is a failure."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = ready()
        if found:
            return found
        assert driver.poll() is None, f"the job ended too early:\n{driver.stderr.read()[-2000:]}"
        time.sleep(pause)
    raise AssertionError("it never came")


def test_sigterm_ends_with_75_and_the_same_command_goes_on(audio, tokens, tmp_path, start):
    line = tokenize(audio, tmp_path / "out", "workers.count=1", "shards.clips=8", same_codec(tokens))
    driver = start(line)
    wait_for(lambda: list((tmp_path / "out").glob("tokens-*.json")), driver)
    driver.terminate()
    assert driver.wait(timeout=60) == 75
    assert "run the same command to go on" in driver.stderr.read()
    run(line)
    assert hashes(tmp_path / "out") == hashes(tokens)


def test_sigterm_while_a_codec_is_fitted_ends_with_75(tmp_path, start):
    write_tones(tmp_path / "in", 6, seconds=20)
    driver = start(tokenize(tmp_path / "in", tmp_path / "out", "codec.bitrate_kbps=12"))
    while "fitting the codec" not in (line := driver.stderr.readline()):
        assert line, "the job ended too early"
    driver.terminate()
    assert driver.wait(timeout=60) == 75
    printed = driver.stderr.read()
    assert "run the same command to go on" in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


SIGNAL_TO_THE_CORE = """
import os, signal, time
import ray
from megascale.errors import Stopped
from megascale.stopping import stop_on_signal
from megascale.cluster import start_ray

stop_on_signal()
made = ray._raylet.CoreWorker
ray._raylet.CoreWorker = lambda *a, **k: (made(*a, **k), os.kill(os.getpid(), signal.SIGTERM))[0]
try:
    start_ray()
except Stopped as stopped:
    time.sleep(4)
    print(stopped)
"""


def test_sigterm_that_rays_core_meets_stops_and_does_not_abort():
    """The core catches the signal from its start to the end of ray.init, and aborts 3 s later."""
    assert "stopped by SIGTERM" in run([sys.executable, "-c", SIGNAL_TO_THE_CORE])


def test_command_stopped_while_it_fits_a_codec_goes_on(tmp_path, start):
    write_tones(tmp_path / "in", 6)
    line = tokenize(tmp_path / "in", tmp_path / "out")
    driver = start(line)
    assert "fitting a codec" in driver.stderr.readline()
    driver.terminate()
    assert driver.wait(timeout=60) == 75
    printed = run(line)
    assert "fitting the codec  100%" in printed and "6 clips" in printed


def test_lost_and_cut_shards_of_an_unfinished_folder_are_made_again(audio, tokens, tmp_path):
    """What writers that were killed yesterday left goes; another driver may be writing the rest."""
    out = Path(shutil.copytree(tokens, tmp_path / "out"))
    (out / "manifest.json").unlink()
    left, live = out / ".tokens-000000.tar.abcdefgh.part", out / ".tokens-000002.tar.abcdefgh.part"
    for path in (left, live):
        path.write_bytes(bytes(100))
    os.utime(left, (time.time() - 86_400,) * 2)
    first, second = out / "tokens-000000.tar", out / "tokens-000001.tar"
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    printed = run(tokenize(audio, out, "workers.count=1", "shards.clips=8"))
    assert "in 2 shards with 1 workers" in printed
    assert hashes(out) == hashes(tokens)
    assert live.exists() and not left.exists()


def test_cut_index_and_cut_plan_of_an_unfinished_folder_are_refused_by_name(audio, tokens, tmp_path):
    out = Path(shutil.copytree(tokens, tmp_path / "out"))
    (out / "manifest.json").unlink()
    for name in ("tokens-000001.json", "plan.json"):
        (out / name).write_bytes((out / name).read_bytes()[:100])
        printed = run(tokenize(audio, out, "shards.clips=8"), exit_code=2)
        assert f"{out / name}: broken: " in printed and "delete it" in printed and "Traceback" not in printed
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "it is empty"),
        (lambda folder: (folder.mkdir(), (folder / "a.wav").write_text("text")), "not an audio file"),
        (lambda folder: folder.write_text("a file"), "a file, not a folder"),
    ],
    ids=["missing", "empty", "nothing readable", "a file"],
)
def test_source_without_audio_ends_with_2_and_writes_nothing(tmp_path, make, message):
    make(tmp_path / "in")
    printed = run(tokenize(tmp_path / "in", tmp_path / "out"), exit_code=2)
    assert message in printed and str(tmp_path / "in") in printed
    assert not (tmp_path / "out").exists()


def test_clip_that_kills_its_workers_is_quarantined_and_its_shard_is_not_lost(tokens, tmp_path, start):
    """Every worker that opens the one long file is killed while it reads it."""
    write_tones(tmp_path / "in", 6)
    killer = tmp_path / "in" / "killer.wav"
    soundfile.write(killer, np.zeros((44_100 * 900, 2), dtype=np.int16), 44_100)
    line = tokenize(
        tmp_path / "in",
        tmp_path / "out",
        "clips.seconds=null",
        "clips.max_seconds=1000",
        "workers.count=1",
        same_codec(tokens),
    )
    driver = start(line)
    killed = set()  # a worker is there for a while after it was killed
    while driver.poll() is None:
        worker = worker_of(driver)
        if worker is not None and worker.pid not in killed and opens(worker, killer):
            worker.kill()
            killed.add(worker.pid)
    assert driver.returncode == 0, driver.stderr.read()[-2000:]
    assert len(killed) == 6  # three times with its shard, three times alone
    manifest = read_manifest(str(tmp_path / "out"))
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert manifest.num_clips == 6
    assert bad["url"] == str(killer) and bad["attempts"] == 3 and "died" in bad["reason"]


@pytest.mark.slow
def test_several_clips_that_kill_their_workers_cost_no_other_clip(tokens, tmp_path, start):
    """Two killers in shards of their own, in the hands of one worker, with innocent shards beside them."""
    write_tones(tmp_path / "in", 10)
    killers = [tmp_path / "in" / folder / "killer.wav" for folder in ("high", "low")]
    for killer in killers:
        soundfile.write(killer, np.zeros((44_100 * 900, 2), dtype=np.int16), 44_100)
    options = ["clips.seconds=null", "clips.max_seconds=1000", "workers.count=1", "shards.clips=2"]
    driver = start(tokenize(tmp_path / "in", tmp_path / "out", *options, same_codec(tokens), "quarantine.max_share=1"))
    while driver.poll() is None:
        worker = worker_of(driver)
        if worker is not None and any(opens(worker, killer) for killer in killers):
            worker.kill()
    assert driver.returncode == 0, driver.stderr.read()[-2000:]
    bad = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(item["url"] for item in bad) == sorted(map(str, killers))
    assert read_manifest(str(tmp_path / "out")).num_clips == 10


def opens(process: psutil.Process, path: Path) -> bool:
    try:
        return any(file.path == str(path) for file in process.open_files())
    except psutil.Error:
        return False
