"""How a command ends: exit codes, one line for a mistake of the user, a traceback for a fault of the code."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from pydantic import Field

from megascale import cli
from megascale.config import Section
from megascale.errors import CheckpointError, ConfigError, DataError, MegascaleError, QuarantineExceeded, Stopped


class TinyConfig(Section):
    steps: int = Field(1, description="how many")


@pytest.fixture(autouse=True)
def sigterm_as_it_was() -> Iterator[None]:
    # a job that misses the signal must not end the tests
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def main(run: Callable[[TinyConfig], object], *arguments: str) -> int:
    return cli._main("tiny", TinyConfig, run, lambda config: f"{config.steps} steps", arguments or ("steps=2",))


def failing(failure: BaseException) -> Callable[[TinyConfig], None]:
    def run(config: TinyConfig) -> None:
        raise failure

    return run


@pytest.mark.parametrize(
    ("error", "code"), [(DataError, 2), (MegascaleError, 2), (QuarantineExceeded, 3), (Stopped, 75)]
)
def test_exit_code_says_how_the_job_ended(capsys, error, code):
    assert main(failing(error("because"))) == code
    assert capsys.readouterr().err == f"{error.__name__}: because\n"


@pytest.mark.parametrize("error", [KeyError, AssertionError, RuntimeError])
def test_fault_of_the_code_is_not_swallowed(error):
    with pytest.raises(error):
        main(failing(error("a bug")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_ctrl_c_end_a_job_with_75(capsys, number):
    assert main(lambda config: os.kill(os.getpid(), number)) == 75
    assert "run the same command to go on" in capsys.readouterr().err


def test_sigterm_after_a_job_has_failed_changes_nothing(capsys):
    """A launcher that sees one rank end sends it to all the others, some of which are about to end themselves."""
    assert main(failing(DataError("gone"))) == 2
    os.kill(os.getpid(), signal.SIGTERM)
    assert capsys.readouterr().err == "DataError: gone\n"


def test_each_rank_of_pretraining_leaves_its_exit_code_where_it_is_asked_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEGASCALE_EXIT_CODES", str(tmp_path / "new"))
    for rank in ("0", "11"):
        monkeypatch.setenv("RANK", rank)
        assert cli.pretrain(["no-such-config.yaml"]) == 2
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {
        "rank-00000": "2 ConfigError\n",
        "rank-00011": "2 ConfigError\n",
    }
    monkeypatch.setenv("MEGASCALE_EXIT_CODES", "/proc/none")
    assert cli.pretrain(["no-such-config.yaml"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_config_may_lie_in_a_folder_with_an_equals_sign(tmp_path):
    recipe = tmp_path / "lr=3" / "tiny.yaml"
    recipe.parent.mkdir()
    recipe.write_text("steps: 5\n", encoding="utf-8")
    found: list[TinyConfig] = []
    assert main(found.append, str(recipe)) == 0
    assert found == [TinyConfig(steps=5)]


def test_what_only_another_machine_meets_is_told_by_its_first_rank(capsys, monkeypatch):
    for name, value in (("RANK", "8"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(failing(DataError("/data: no manifest.json"))) == 2
    assert main(failing(ConfigError("wrong"))) == 2
    assert capsys.readouterr().err == "[rank 8] DataError: /data: no manifest.json\n"


def test_dry_run_can_be_stopped(capsys):
    def describe(config: TinyConfig) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "a plan"

    assert cli._main("tiny", TinyConfig, failing(RuntimeError("ran")), describe, ["steps=7", "--dry-run"]) == 75
    assert capsys.readouterr().out == ""


def test_dry_run_never_runs(capsys):
    assert main(failing(RuntimeError("ran")), "steps=7", "--dry-run") == 0
    assert capsys.readouterr().out == "7 steps\n"


def test_what_every_rank_sees_is_told_by_rank_0_alone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    assert main(failing(DataError("gone"))) == 2
    assert capsys.readouterr().err == ""
    full = ConfigError("no room on this GPU")
    full.of_own_device = True
    assert main(failing(full)) == 2
    assert capsys.readouterr().err == "[rank 1] ConfigError: no room on this GPU\n"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert main(failing(ConfigError("wrong"))) == 2
    assert main(failing(Stopped("saved"))) == 75
    assert capsys.readouterr().err == ""
    # a fault after the ranks have met may be this rank's alone, and would else be told by nobody
    assert main(failing(CheckpointError("rank-1.pt: changed"))) == 2
    assert capsys.readouterr().err == "[rank 1] CheckpointError: rank-1.pt: changed\n"
