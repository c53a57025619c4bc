"""`make chaos`: what a cluster and a store do on bad days, done to real jobs; nothing may be lost, repeated or changed.

The corpus is of many lengths, formats and rates, with one spoilt recording, at 12 kbps. Every line of the table holds its
shards against those of one undisturbed run. The moments are random, and the seed fixes them.
"""

import argparse
import json
import logging
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
import soundfile

sys.path.append(str(Path(__file__).resolve().parents[1]))  # after this folder: each has a conftest

from conftest import ENVIRONMENT, ROOT, command
from fault_proxy import FaultProxy
from s3_servers import keys_in_environment, moto
from support import tone

from megascale.data.index import ShardIndex, index_name, read_clips, read_manifest
from megascale.log import say
from megascale.tokenize.calibration import calibrate

RECORDINGS, LEAST_SECONDS, MOST_SECONDS = 20, 5.0, 75.0  # about 400 clips in 50 shards: long enough for many kills
RATES_HZ = (24_000, 44_100, 16_000, 48_000, 22_050)
REPORT = ROOT / "runs" / "bench" / "chaos.json"


@dataclass
class Line:
    """One line of the table."""

    what: str
    times: int
    jobs: int = 0
    lost: int = 0
    repeated: int = 0
    shards_that_differ: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    wrong: str = ""

    @property
    def passed(self) -> bool:
        return not (self.lost or self.repeated or self.shards_that_differ or self.quarantined or self.wrong)


class Chaos:
    """The corpus, the undisturbed run, and the processes that were started and may be left behind."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.seen: set[psutil.Process] = set()
        self.weights = folder / "codec.safetensors"
        sample = [tone(2.0, 24_000, 110 * 1.2**i, seed=i) for i in range(15)]
        self.weights.write_bytes(calibrate(sample, num_codebooks=16, seed=seed).to_bytes())
        write_corpus(folder / "audio", random.Random(seed))

    def start(self, source: Path | str, output: Path | str, *overrides: str) -> subprocess.Popen:
        line = command("tokenize_audio.py", "configs/tokenize/smoke.yaml", f"source.url={source}")
        line += [
            f"output.url={output}",
            "shards.clips=8",
            "workers.count=2",
            "quarantine.max_share=0.05",
            "codec.bitrate_kbps=12",
            f"codec.weights={self.weights}",
        ]
        log = (self.folder / "jobs.log").open("a")
        return subprocess.Popen(
            [*line, *overrides], cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )

    def undisturbed(self) -> float:
        """Make the shards that all others are held against; return how long the first one took to come."""
        began = time.monotonic()
        job = self.start(self.folder / "audio", self.folder / "plain")
        while not list((self.folder / "plain").glob("tokens-*.json")) and job.poll() is None:
            time.sleep(0.1)
        first = time.monotonic() - began
        if job.wait() != 0:
            raise SystemExit(f"the undisturbed run failed:\n{self.log()}")
        manifest = read_manifest(str(self.folder / "plain"))
        if not manifest.num_quarantined:
            raise SystemExit("the undisturbed run quarantined nothing: the spoilt recording was read")
        say(f"undisturbed: {manifest.num_clips} clips, {manifest.num_quarantined} quarantined")
        return first

    def log(self) -> str:
        return (self.folder / "jobs.log").read_text()[-3000:]

    def finish(self, line: Line, job: subprocess.Popen, output: Path) -> None:
        """Wait for a job's end, and compare what it left with the undisturbed run."""
        code = job.wait()
        line.jobs += 1
        if code != 0:
            line.wrong = line.wrong or f"exit code {code}: {self.log()[-400:]}"
            return
        compare(line, output, self.folder / "plain")

    def processes(self, job: subprocess.Popen) -> list[psutil.Process]:
        try:
            found = psutil.Process(job.pid).children(recursive=True)
        except psutil.Error:
            return []
        self.seen.update(found)
        return found

    def workers(self, job: subprocess.Popen) -> list[psutil.Process]:
        return [p for p in self.processes(job) if "ShardWorker" in _title(p)]

    def end_leftovers(self) -> int:
        """End, by id, what killed drivers left running; return how many processes that were."""
        time.sleep(5)
        left = [p for p in self.seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        for process in left:
            process.kill()
        return len(left)


def write_corpus(folder: Path, rng: random.Random) -> None:
    """Write recordings of many lengths, two formats and five rates, and spoil one of them in its middle."""
    folder.mkdir()
    for i in range(RECORDINGS):
        rate_hz, seconds = RATES_HZ[i % len(RATES_HZ)], rng.uniform(LEAST_SECONDS, MOST_SECONDS)
        path = folder / f"{i:03d}.{('wav', 'flac')[i % 2]}"
        soundfile.write(path, tone(seconds, rate_hz, 150 * 1.15**i, seed=i), rate_hz, subtype="PCM_16")
    spoilt = bytearray(path.read_bytes())
    middle = len(spoilt) // 2
    spoilt[middle : middle + 4096] = rng.randbytes(4096)
    path.write_bytes(spoilt)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def compare(line: Line, output: Path, plain: Path) -> None:
    """Count what an output lost, holds twice, or holds otherwise than the undisturbed one."""
    manifest, reference = read_manifest(str(output)), read_manifest(str(plain))
    expected = {shard.name: shard.sha256 for shard in reference.shards}
    found = {shard.name: shard.sha256 for shard in manifest.shards}
    line.shards_that_differ += sum(found.get(name) != sha256 for name, sha256 in expected.items())
    line.shards_that_differ += len(found.keys() - expected.keys())
    line.quarantined += abs(manifest.num_quarantined - reference.num_quarantined)
    planned = Counter(clip.key for clip in read_clips(str(plain), reference, 16))
    stored = Counter(clip.key for clip in read_clips(str(output), manifest, 16))  # checks each shard's sha256
    line.lost += (planned - stored).total()
    line.repeated += sum(count - 1 for count in stored.values())
    for shard in manifest.shards:
        index = ShardIndex.model_validate_json((output / index_name(shard.name)).read_bytes())
        if index.sha256 != shard.sha256:
            line.wrong = f"{index_name(shard.name)} is not of the shard that the manifest names"
    tars = {path.name for path in output.glob("tokens-*.tar")}
    if tars != found.keys():
        line.wrong = f"tars that the manifest does not name: {sorted(tars - found.keys())}"


def count_of_workers(chaos: Chaos) -> Iterator[Line]:
    for count in (1, 2, 4):
        line = Line(f"{count} workers", 1)
        out = chaos.folder / f"count-{count}"
        # four workers also on a machine with two CPUs
        ENVIRONMENT["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": max(count, 2)})
        chaos.finish(line, chaos.start(chaos.folder / "audio", out, f"workers.count={count}"), out)
        del ENVIRONMENT["RAY_OVERRIDE_RESOURCES"]
        yield line


def kill(
    chaos: Chaos, what: str, times: int, most_seconds: float, strike: Callable[[subprocess.Popen], bool]
) -> Iterator[Line]:
    """Strike at random moments, at one job after another until it was done often enough; a job that died of it is
    started again. `strike` returns whether it found what to kill."""
    line, done = Line(f"kill -9 of {what}", times), 0
    while done < times and not line.wrong:
        out = chaos.folder / f"{what.split()[-1]}-{line.jobs}"
        job = chaos.start(chaos.folder / "audio", out)
        while done < times and still_runs(job, chaos.random.uniform(0, most_seconds)):
            done += strike(job)
            if job.poll() == -signal.SIGKILL:
                job = chaos.start(chaos.folder / "audio", out)
        chaos.finish(line, job, out)
    say(f"{chaos.end_leftovers()} processes were left after kill -9 of {what}")
    yield line


def still_runs(job: subprocess.Popen, seconds: float) -> bool:
    """Return whether a job still runs after so many seconds; at once if it ends before."""
    try:
        job.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def strike_worker(chaos: Chaos, job: subprocess.Popen) -> bool:
    victims = chaos.workers(job)
    with suppress(psutil.NoSuchProcess):
        if victims:
            chaos.random.choice(victims).kill()
            return True
    return False


def strike_driver(chaos: Chaos, job: subprocess.Popen) -> bool:
    chaos.processes(job)  # noted, for they may outlive it
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    return True


def faults_of_s3(chaos: Chaos, seed: int) -> Iterator[Line]:
    with keys_in_environment(), moto() as server, FaultProxy(server.endpoint, 0.1, seed) as proxy:
        server.upload(chaos.folder / "audio", "audio")
        job = chaos.start("s3://bucket/audio", "s3://bucket/out", f"storage.endpoint_url={proxy.url}")
        job.wait()
        out = chaos.folder / "s3"
        server.filesystem().get("bucket/out", str(out), recursive=True)
        faults = {kind: count for kind, count in sorted(proxy.done.items()) if kind != "good"}
        told = ", ".join(f"{count} {kind}" for kind, count in faults.items())
        line = Line(f"S3 faults at 10% of {proxy.done.total()} calls ({told})", sum(faults.values()))
        chaos.finish(line, job, out)
    yield line


def disk_full(chaos: Chaos) -> Iterator[Line]:
    """A disk that is full half way, then larger. Left out where this user may not mount one."""
    disk = chaos.folder / "disk"
    disk.mkdir()
    codec = chaos.weights.stat().st_size  # lies beside the shards, too
    with mounted(disk, f"size={codec + (1 << 20)}") as may:
        if not may:
            say("disk full: left out, because this user may not mount a disk")
            return
        line = Line("disk full, then room again", 1)
        job = chaos.start(chaos.folder / "audio", disk / "out")
        if job.wait() != 2 or "No space left on device" not in chaos.log():
            line.wrong = f"exit code {job.returncode} on a full disk: {chaos.log()[-400:]}"
        subprocess.run(["mount", "-o", f"remount,size={codec + (16 << 20)}", str(disk)], check=True)
        chaos.finish(line, chaos.start(chaos.folder / "audio", disk / "out"), disk / "out")
    yield line


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        may = done.returncode == 0
    except OSError:
        may = False
    yield may
    if may:
        subprocess.run(["umount", str(folder)], check=True)


def table(lines: list[Line]) -> str:
    rows = [
        (
            "what",
            "times",
            "jobs",
            "clips lost",
            "repeated",
            "shards that differ",
            "quarantined otherwise",
            "seconds",
            "",
        )
    ]
    for line in lines:
        counts = (line.times, line.jobs, line.lost, line.repeated, line.shards_that_differ, line.quarantined)
        seconds = f"{line.seconds:.0f}"
        rows.append((line.what, *map(str, counts), seconds, "ok" if line.passed else f"FAILED {line.wrong}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker-kills", type=int, default=50)
    parser.add_argument("--driver-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lines: list[Line] = []
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's line for every request
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), options.seed)
        first_seconds = chaos.undisturbed()
        say(f"undisturbed: the first shard came after {first_seconds:.0f} s")
        parts = (
            count_of_workers(chaos),
            kill(chaos, "a worker", options.worker_kills, first_seconds, partial(strike_worker, chaos)),
            kill(chaos, "the driver", options.driver_kills, 2.5 * first_seconds, partial(strike_driver, chaos)),
            faults_of_s3(chaos, options.seed),
            disk_full(chaos),
        )
        began = time.monotonic()
        for part in parts:
            for line in part:
                line.seconds, began = time.monotonic() - began, time.monotonic()
                lines.append(line)
                say(table([line]).splitlines()[-1])
    print(table(lines))
    facts = {"seed": options.seed, "cpus": os.cpu_count(), "machine": platform.machine(), "ray": version("ray")}
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(line) | {"passed": line.passed} for line in lines]
    REPORT.write_text(json.dumps({**facts, "lines": rows}, indent=1))
    return 0 if all(line.passed for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
