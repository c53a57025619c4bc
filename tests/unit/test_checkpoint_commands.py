"""`megascale checkpoints`: what is told, what is deleted, and the exit code."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import save, steps

from megascale import __main__ as command
from megascale.train import checkpoint

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys, monkeypatch) -> Iterator[Call]:
    monkeypatch.setattr(command, "stop_on_signal", lambda: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = command.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    yield run


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """Five checkpoints, the second the best; the third and a sixth were cut short."""
    for step, loss in ((1, 3.0), (2, 1.5), (3, 2.0), (4, None), (5, 2.5), (6, 1.0)):
        save(tmp_path / "run" / "checkpoints", step, loss)
    for step in (3, 6):
        (checkpoint.step_folder(tmp_path / "run" / "checkpoints", step) / "manifest.json").unlink()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    return tmp_path / "run"


@pytest.fixture(params=["run folder", "its checkpoints", "file URL"])
def url(request, run_folder) -> str:
    return {"run folder": f"{run_folder}/", "its checkpoints": f"{run_folder}/checkpoints"}.get(
        request.param, f"file://{run_folder}"
    )


def test_list_says_what_there_is_and_which_is_best_and_newest(call, url):
    code, out, err = call("checkpoints", "list", url)
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert re.split("  +", head) == ["checkpoint", "samples", "valid loss", "ranks", "size", "committed (UTC)", "state"]
    assert [line.split()[0] for line in lines] == [f"step-0000000{n}" for n in range(1, 7)]
    states = [re.split("  +", line)[-1] for line in lines]
    assert states == ["committed", "committed, best", "incomplete", "committed", "committed, newest", "incomplete"]
    _, samples, loss, ranks, size, unit, day, clock, *_ = lines[1].split()
    assert (samples, loss, ranks, unit) == ("32", "1.5000", "2", "kB")
    assert float(size) > 1 and len(day) == 10 and len(clock) == 5
    assert lines[3].split()[1:4] == ["64", "-", "2"]
    assert len({line.index(re.split("  +", line)[-1]) for line in lines}) == 1  # a tidy table


def test_verify_of_whole_checkpoints_ends_with_0(call, url):
    code, out, err = call("checkpoints", "verify", url)
    assert code == 0
    assert [line.rpartition("/")[2] for line in out.splitlines()] == [
        f"step-0000000{n}: incomplete, nothing loads it" for n in (3, 6)
    ]
    assert err.count("whole") == 4


def test_verify_names_every_bad_and_missing_file_and_ends_with_2(call, run_folder):
    folder = checkpoint.step_folder(run_folder / "checkpoints", 4)
    (folder / "model" / "config.json").write_bytes(b"{}")
    (folder / "rank-00001.safetensors").unlink()
    (folder / "notes.txt").touch()
    (folder / "planted.pt").touch()
    for url in (run_folder, folder, f"{folder}/"):
        code, out, err = call("checkpoints", "verify", url)
        assert code == 2
        told = [line for line in out.splitlines() if "step-00000004" in line]
        assert [line.partition(": ")[0].removeprefix(f"{folder}/") for line in told] == [
            "model/config.json", "rank-00001.safetensors", "notes.txt", "planted.pt",
        ]  # fmt: skip
        assert "its sha256 is not the one" in told[0] and "missing" in told[1]
        assert "nothing loads it" in told[2] and "delete it" in told[3]
        assert err.splitlines()[-1] == f"CheckpointError: {str(url).rstrip('/')}: 3 files are damaged or missing"
    assert call("checkpoints", "verify", checkpoint.step_folder(run_folder / "checkpoints", 5))[0] == 0


def test_verify_of_a_broken_or_missing_manifest_ends_with_2(call, run_folder):
    folder = checkpoint.step_folder(run_folder / "checkpoints", 4)
    (folder / "manifest.json").write_bytes(b"{")
    code, out, _ = call("checkpoints", "verify", run_folder)
    assert code == 2
    assert f"{folder}/manifest.json: broken: " in out
    code, out, _ = call("checkpoints", "verify", checkpoint.step_folder(run_folder / "checkpoints", 6))
    assert code == 2
    assert "no manifest" in out


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], [2, 4, 5]),
        (["--keep-last", "1"], [2, 5]),
        (["--keep-last", "1", "--keep-every", "2"], [2, 4, 5]),
        (["--keep-last=9"], [1, 2, 4, 5]),
    ],
)
def test_prune_keeps_the_best_the_newest_and_what_was_asked_for(call, url, run_folder, options, left):
    checkpoints = run_folder / "checkpoints"
    before = sorted(p.name for p in checkpoints.iterdir())
    code, dry, err = call("checkpoints", "prune", url, *options, "--dry-run")
    assert (code, err) == (0, "")
    assert sorted(p.name for p in checkpoints.iterdir()) == before
    code, out, err = call("checkpoints", "prune", url, *options)
    assert (code, err) == (0, "")
    assert steps(checkpoint.committed(checkpoints)) == left
    # of the incomplete ones the older goes, the newer may be a save under way
    assert {p.name for p in checkpoints.iterdir()} == {f"step-0000000{n}" for n in (*left, 6)}
    gone = set(before) - {p.name for p in checkpoints.iterdir()}
    assert {line.split()[1].rpartition("/")[2] for line in out.splitlines()[:-1]} == gone
    assert {line.split()[2].rpartition("/")[2] for line in dry.splitlines()[:-1]} == gone


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "ConfigError: megascale: the following arguments are required: COMMAND; see --help"),
        (
            ["checkpoints"],
            "ConfigError: megascale checkpoints: the following arguments are required: ACTION; see --help",
        ),
        (["checkpoints", "list"], "ConfigError: megascale checkpoints list: the following arguments are required: URL"),
        (["checkpoints", "list", "gone"], "CheckpointError: gone: no checkpoints here"),
        (["checkpoints", "verify", "gone"], "CheckpointError: gone: no checkpoints here"),
        (
            ["checkpoints", "prune", "x", "--keep-last", "0"],
            "ConfigError: megascale checkpoints prune: argument --keep-l",
        ),
        (["checkpoints", "prune", "x", "--keep", "0"], "ConfigError: megascale"),
        (["checkpoints", "list", "s3://me:secret@b/run"], "ConfigError: URL: has credentials in it"),
        (["checkpoints", "list", "nosuch://b/run"], "StorageError: nosuch://b/run: "),
    ],
)
def test_mistake_is_one_line_and_ends_with_2(call, arguments, line):
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(line) and "secret" not in err


@pytest.mark.parametrize("action", ["list", "verify", "prune"])
def test_help_tells_every_option(action):
    done = subprocess.run(
        [sys.executable, "-m", "megascale", "checkpoints", action, "--help"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"megascale checkpoints {action}" in done.stdout and "--endpoint-url" in done.stdout and "URL" in done.stdout
    assert action != "prune" or {"--keep-last", "--keep-every", "--dry-run"} <= set(done.stdout.split())
