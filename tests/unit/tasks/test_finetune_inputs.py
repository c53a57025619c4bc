"""What fine-tuning cannot use ends with 2 and one line that names the file or the key, and nothing is written."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import write_pretrained, write_token_folder

from megascale import cli

SMOKE = str(Path(__file__).parents[3] / "configs" / "finetune" / "smoke.yaml")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with tokens of several kinds and an encoder; 8 clips in turn lie on train x 4, valid x 2, test x 2."""
    write_token_folder(tmp_path / "tokens", 40, num_codebooks=4)
    write_token_folder(tmp_path / "other-codec", 40, fingerprint="cd" * 32)
    write_token_folder(tmp_path / "one-codebook", 40, num_codebooks=1)
    write_token_folder(tmp_path / "tags", 40, labels=lambda i: {"class": [("low", "high")[i % 2]]})
    write_token_folder(tmp_path / "one-class", 40, labels=lambda i: {"class": "low"})
    # the last test clip alone is of a third class, and all that validates is of one
    write_token_folder(tmp_path / "unseen", 40, labels=lambda i: {"class": "new" if i == 39 else "ab"[i % 2]})
    write_token_folder(
        tmp_path / "valid-of-one", 40, labels=lambda i: {"class": "a" if i % 8 in (4, 5) else "ab"[i % 2]}
    )
    # as many NSynth copies have it: a class in training and validation alone
    write_token_folder(
        tmp_path / "untested", 40, labels=lambda i: {"class": "lead" if i % 8 in (0, 4) else "ab"[i % 2]}
    )
    write_pretrained(tmp_path / "encoder", 2)
    (tmp_path / "a.txt").write_text("".join(f"{i:04d}.wav\n" for i in range(10)))
    (tmp_path / "b.txt").write_text("".join(f"{i:04d}.wav\n" for i in range(9, 20)))
    (tmp_path / "c.txt").write_text("gone.wav\n")
    monkeypatch.chdir(tmp_path)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


OFFICIAL = "task.protocol=official"


@pytest.mark.parametrize("way", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("data.bitrate_kbps=3", "ConfigError: finetune.data.bitrate_kbps=3.0: encoder was pretrained at 1.5 kbps"),
        ("data.bitrate_kbps=6", "DataError: tokens: stored with 4 codebooks, data.bitrate_kbps=6.0 needs 8"),
        ("data.url=other-codec", "CheckpointError: encoder: pretrained on tokens of codec abababab; other-codec holds"),
        ("data.url=tags", "DataError: 0000.wav: task.label=class holds several values; one a clip, or task.kind=multi"),
        (
            "task.kind=multi",
            "DataError: 0000.wav: task.label=class holds one value, 'low'; task.kind=multi takes lists",
        ),
        ("data.url=one-class", "DataError: task.label=class: 1 class; a classifier needs at least two"),
        (
            f"data.url=unseen {OFFICIAL}",
            "DataError: task.label=class: no training clip is of 'new', which the test split holds; task.classes can",
        ),
        (
            f"data.url=untested {OFFICIAL}",
            "DataError: task.label=class: no test clip is of 'lead', which training holds; task.classes can leave it out,",
        ),
        (
            f"data.url=valid-of-one {OFFICIAL}",
            "DataError: task.label=class: all 10 clips of the valid split are of 'a'",
        ),
        (f"task.group=artist {OFFICIAL}", "DataError: task.group=artist: no clip has this label"),
        (
            f"data.test_url=other-codec {OFFICIAL}",
            "TokenError: data.test_url=other-codec: holds tokens of codec cdcdcdcd; tokens holds codec abababab. ",
        ),
        (
            f"data.test_url=one-codebook {OFFICIAL}",
            "DataError: one-codebook: stored with 1 codebooks, data.bitrate_kbps=1.5 needs 2",
        ),
        (f"data.test_url=gone {OFFICIAL}", "DataError: gone: no manifest.json; not a token folder, or"),
        (
            "data.test_url=tokens",
            "ConfigError: finetune: data.test_url is for task.protocol=official; stratified divides data.url",
        ),
        ("task.protocol=lists", "ConfigError: finetune.task: lists.train is required for protocol=lists"),
        (
            "task.protocol=lists task.lists={train: a.txt, valid: b.txt, test: c.txt}",
            "DataError: b.txt: '0009.wav' is in the train list, too",
        ),
        (
            "task.protocol=lists task.lists={train: a.txt, valid: c.txt, test: d.txt}",
            "StorageError: d.txt: no such file",
        ),
        ("task.protocol=folds task.fold=10", "ConfigError: finetune.task: fold=10 must be one of the 10 folds, 0 to 9"),
        (
            "task.protocol=lists task.lists.trains=a.txt",
            "ConfigError: finetune.task.lists.trains=a.txt: unknown key; did",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(work, capsys, arguments, line, way):
    overrides: list[str] = []
    for word in arguments.split(" "):
        if "=" in word or word.startswith("--"):
            overrides.append(word)
        else:
            overrides[-1] += f" {word}"
    given = [SMOKE, "data.url=tokens", "checkpoint=encoder", "output.url=out", *overrides, *way]
    assert cli.finetune(given) == 2
    told = capsys.readouterr().err
    assert told.startswith(line) and told.count("\n") == 1
    assert not (work / "out").exists()


def test_dry_run_says_how_the_clips_are_split_and_what_was_found(work, capsys):
    given = [SMOKE, "data.url=tokens", "checkpoint=encoder", "output.url=out", "task.protocol=official", "--dry-run"]
    assert cli.finetune(given) == 0
    plan, split = capsys.readouterr().out.splitlines()
    assert plan.startswith("40 clips, 2 classes: 20 train, 10 valid, 10 test; ft, 2 epochs, ")
    assert split == (
        "split: 20 train, 10 valid, 10 test recordings; no recording on two sides; no equal codes on two sides"
    )
    assert not (work / "out").exists()
