"""The page: one file that needs nothing from outside, whatever names and numbers a run holds."""

import base64
import io
import json
import math
import os
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megascale import report
from megascale.downstream.scores import score
from megascale.downstream.table import PAPER
from megascale.downstream.table1_config import ARMS, BITRATES_KBPS
from megascale.log import read_metrics

NASTY = '<script src="http://evil">alert(1)</script> & "quotes" $x_1_2$ a$b^^$.wav'
NOT_UTF8 = os.fsdecode(b"caf\xe9.wav")


class Reader(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.cell: str | None = None
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self.cell = "" if tag in ("td", "th") else None

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            assert self.cell is not None
            self.rows[-1].append(self.cell)
            self.cell = None

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.cell is not None:
            self.cell += data

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def images(self) -> list[bytes]:
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in sources]


def figure() -> Figure:
    made = Figure(figsize=(1, 1))
    made.subplots().plot([0, 1])
    return made


def table(tasks: tuple[str, ...] = ("gtzan", "nsynth"), accuracy: float | None = None) -> dict[str, Any]:
    """A table as table1 makes it; every cell another accuracy, so that a mixed-up one shows."""
    cells, summary = [], []
    for i, (task, arm, kbps) in enumerate((t, a, k) for t in tasks for a in ARMS for k in BITRATES_KBPS):
        found = score(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), ["a", "b"])
        cell = {"task": task, "arm": arm, "bitrate_kbps": kbps, **found}
        cell["accuracy"] = (10 + i) / 100 if accuracy is None else accuracy
        cells.append(cell)
        shown = {key: cell[key] for key in ("task", "arm", "bitrate_kbps", "accuracy", "count")}
        macro_f1 = cell["accuracy"] - 0.05
        interval = [cell["accuracy"] - 0.04, cell["accuracy"] + 0.06]
        summary.append(shown | {"macro_f1": macro_f1, "accuracy_ci95": interval})
    return {"cells": cells, "summary": summary, "baselines": {}}


def pretrained(folder: Path, losses: list[float], num_codebooks: int = 2, validated: bool = True) -> dict[str, Any]:
    """A pretraining run's folder with metrics; returns its result."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": i + 1, "train/loss": loss, "valid/loss": loss} for i, loss in enumerate(losses)]
    for row in rows:
        row |= {"train/lr": 1e-3, "train/grad_norm": 0.5, "train/clips_per_second": 9.0, "train/data_wait_share": 0.1}
        for q in range(num_codebooks):
            row |= {f"train/loss_minus_unigram_q{q}": row["train/loss"] - 6.5, f"train/acc_q{q}": 0.25}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    validation = {"valid/loss": losses[-1] if losses else math.nan, "valid/unigram_loss": 6.5}
    for q in range(num_codebooks):
        validation |= {f"valid/acc_q{q}": 0.25 / (q + 1), f"valid/unigram_acc_q{q}": 0.125}
    result = {"bitrate_kbps": 1.5, "validation": validation if validated else {}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return result


def full_page(folder: Path, name: str = NASTY) -> Reader:
    page = report.Page(name, str(folder))
    page.heading(name)
    page.text(name, note=True)
    page.table(["a", "b"], [[name, "1"]])
    page.picture("small", figure(), alt=name)
    page.heading("Pretraining")
    report.add_pretraining(page, [(pretrained(folder / "run", [6.0, 5.0]), folder / "run")])
    cell = table(("gtzan",))["cells"][0] | {"classes": [name, "b"]}
    report.add_confusions(page, {"cells": [cell]})
    report.add_clips(page, [(name, np.zeros((64, 75)), np.zeros((2, 75), dtype=np.int16))])
    return Reader(page.write())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a page of every kind of section."""
    made = tmp_path_factory.mktemp("report")
    full_page(made)
    return made


def test_page_needs_nothing_from_outside(folder):
    page = Reader(folder / "report.html")
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(key) or "data:").startswith("data:"), (tag, attributes)
    style = page.words[page.words.index(report._STYLE)]
    assert "url(" not in style
    assert "@import" not in style


def test_names_are_shown_as_text_in_every_place(folder):
    page = Reader(folder / "report.html")
    assert sum(word == NASTY for word in page.words) == 5, "title, h1, heading, text and table cell"
    assert NASTY in [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)


@pytest.mark.parametrize("name", [NOT_UTF8, "$a_b_c$", "line\nbreak"])
def test_name_of_any_bytes_makes_a_page(tmp_path, name):
    assert name.encode("utf-8", "backslashreplace").decode() in full_page(tmp_path, name).words


def test_pictures_lie_beside_the_page_and_are_those_in_it(folder):
    images = Reader(folder / "report.html").images()
    files = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert files.keys() == {
        "small.png", "loss.png", "signals.png", "codebooks.png", "confusion-gtzan.png", "clips.png",
    }  # fmt: skip
    assert sorted(files.values()) == sorted(images)
    for data in images:
        pixels = imread(io.BytesIO(data))
        assert pixels.ndim == 3
        assert pixels[..., :3].std() > 0, "a picture with something in it"


def test_table_has_a_row_per_arm_and_baseline_with_ours_beside_the_papers(tmp_path):
    page = report.Page("Table", str(tmp_path))
    baseline = {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "macro_f1": 0.25, "count": 4}
    found = table()
    found["summary"][2]["against_paper"] = "below"
    own = {"log-mel": baseline, "bag": baseline | {"bitrate_kbps": 12.0}}
    report.add_table(page, found, PAPER, {"gtzan": own, "nsynth": {"log-mel": baseline}})
    header, *rows = Reader(page.write()).rows
    assert len(rows) == 2 * (len(ARMS) + 1) + 1
    assert header[-1] == "paper acc. 1.5 / 12"
    assert [len(row) for row in rows] == [len(header)] * len(rows)
    assert rows[0] == [
        *("gtzan", "scratch", "10.0 [6, 16]", "11.0 [7, 17]", "5.0", "6.0", "4", "69.00 / 63.00"),
    ]
    assert rows[2][:4] == ["", "ft_aug", "14.0 [10, 20]", "15.0 [11, 21]"]
    assert rows[1][:4] == ["", "ft", "12.0 [8, 18] ▼", "13.0 [9, 19]"]
    assert rows[3] == ["", "log-mel", "50.0 [40, 60]", "50.0 [40, 60]", "25.0", "25.0", "4", ""]
    assert rows[4] == ["", "bag", "", "50.0 [40, 60]", "", "25.0", "4", ""]
    assert rows[5][:3] == ["nsynth", "scratch", "16.0 [12, 22]"]
    assert rows[7][-1] == "28.91 / 27.88"


def test_table_without_the_papers_figures_has_no_column_for_them(tmp_path):
    page = report.Page("Table", str(tmp_path))
    report.add_table(page, table(("folders",)), {}, {})
    header, *rows = Reader(page.write()).rows
    assert "paper" not in " ".join(header)
    assert [len(row) for row in rows] == [len(header)] * len(ARMS)


def test_numbers_that_are_not_finite_are_shown_and_break_nothing(tmp_path):
    page = report.Page("Table", str(tmp_path))
    report.add_table(page, table(accuracy=math.nan), PAPER, {})
    report.add_confusions(page, {"cells": table(accuracy=math.nan)["cells"][:1]})
    result = pretrained(tmp_path / "run", [6.0, math.nan, math.inf, math.nan])
    report.add_pretraining(page, [(result, tmp_path / "run")])
    found = Reader(page.write())
    assert found.rows[1][2] == "nan [nan, nan]"
    assert "Loss nan nats" in found.text


def test_class_without_a_test_clip_breaks_no_confusion_picture(tmp_path):
    cell = table()["cells"][0] | {"confusion": [[3, 1, 0], [0, 0, 0], [0, 2, 2]], "classes": ["a", "absent", "c"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.add_confusions(report.Page("x", str(tmp_path)), {"cells": [cell]})


def test_confusion_picture_has_a_matrix_per_arm_and_bitrate_with_shares_of_the_truth():
    cells = {(cell["arm"], cell["bitrate_kbps"]): cell for cell in table(("gtzan",))["cells"]}
    axes = report._confusions("gtzan", cells).axes
    assert len(axes) == len(ARMS) * len(BITRATES_KBPS)
    assert [ax.get_title() for ax in axes][:4] == [
        *("gtzan, scratch, 1.5 kbps: 10%", "gtzan, ft, 1.5 kbps: 12%"),
        *("gtzan, ft_aug, 1.5 kbps: 14%", "gtzan, scratch, 12 kbps: 11%"),
    ]
    assert axes[0].images[0].get_array().tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert sorted(text.get_text() for text in axes[0].texts) == ["1", "1", "2"]


@pytest.mark.parametrize("losses", [[], [6.0, 5.0]])
def test_pretraining_without_validation_says_so(tmp_path, losses):
    pretrained(tmp_path, losses, validated=False)
    result = {"bitrate_kbps": 1.5, "validation": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write_pretrain_report(str(tmp_path), result)
    page = Reader(tmp_path / "report.html")
    assert "Nothing was held out for validation." in page.text
    assert len(page.images()) == (2 if losses else 1), "no signals of a run that reported nothing"


@pytest.mark.parametrize("num_codebooks", [1, 2, 16])
def test_signals_have_a_panel_per_kind_and_a_line_per_codebook(tmp_path, num_codebooks):
    result = pretrained(tmp_path, [6.0, 5.0], num_codebooks)
    figure = report._signals(result, read_metrics(tmp_path / "metrics.jsonl"))
    assert figure is not None
    lines = {ax.get_title(): ax.lines for ax in figure.axes}
    assert [len(found) for found in lines.values()] == [num_codebooks] * 2 + [1] * 4
    for drawn in lines["loss minus unigram (nats)"]:
        assert drawn.get_xydata().tolist() == [[1, -0.5], [2, -1.5]]
    (waited,) = lines["waiting for data (%)"]
    assert waited.get_ydata().tolist() == [10, 10]


def test_signals_of_an_older_run_are_those_it_has(tmp_path):
    rows = [{"step": 1, "train/lr": 0.1}, {"step": 2, "valid/loss": 1.0}]
    figure = report._signals({"bitrate_kbps": 1.5}, rows)
    assert figure is not None
    assert [ax.get_title() for ax in figure.axes if ax.lines] == ["learning rate"]
    assert report._signals({"bitrate_kbps": 1.5}, rows[1:]) is None


def test_pretraining_report_tells_accuracy_beside_the_unigram_baseline(tmp_path):
    result = pretrained(tmp_path, [6.0, 5.0], num_codebooks=16)
    report.write_pretrain_report(str(tmp_path), result)
    text = Reader(tmp_path / "report.html").text
    assert "right for 25.0% of the masked tokens" in text
    assert "most frequent code is right for 12.5%" in text
    assert "Loss 5.000 nats, unigram 6.500" in text


def test_report_of_a_finished_run_is_written_once(tmp_path):
    result = pretrained(tmp_path, [6.0])
    report.write_pretrain_report(str(tmp_path), result)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    report.write_pretrain_report(str(tmp_path), result)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    later = (tmp_path / "report.html").stat().st_mtime + 1
    os.utime(tmp_path / "result.json", (later, later))  # the run was made anew
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    os.utime(tmp_path / "report.html", (later - 1, later - 1))
    report.write_pretrain_report(str(tmp_path), result)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") != "old"
