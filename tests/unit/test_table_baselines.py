"""The table's baselines: on the cells' splits, and knowing nothing of what is tested."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support import write_list, write_token_folder

from megascale.downstream.cells import LabelledTokens
from megascale.downstream.protocols import TaskConfig
from megascale.downstream.split_lists import ListsConfig
from megascale.table_baselines import CHANCE, LOG_MEL, bag_of_codes, score_baselines


def row_of(folder: Path, task: TaskConfig, label: Callable[[int], str], num_clips: int = 40) -> LabelledTokens:
    """A corpus of noise and random codes, of which nothing can be told."""
    (folder / "audio").mkdir()
    rng = np.random.default_rng(0)
    for i in range(num_clips):
        soundfile.write(folder / "audio" / f"{i:04d}.wav", 0.1 * rng.standard_normal(24_000), 24_000)
    write_token_folder(folder / "tokens", num_clips, labels=lambda i: {"class": label(i)}, audio=str(folder / "audio"))
    return LabelledTokens("noise", str(folder / "tokens"), task)


def test_chance_is_the_most_frequent_class_of_training(tmp_path):
    # of eight clips, four train, two choose the model and the last two are tested: there the other class prevails
    row = row_of(
        tmp_path, TaskConfig(label="class", protocol="official"), lambda i: "low" if i % 8 < 3 or i == 6 else "high"
    )
    found = score_baselines(row, [0], (1.5,))[CHANCE]
    assert (found["accuracy"], found["count"]) == (0.1, 10)


def test_every_seed_draws_a_split_of_its_own(tmp_path):
    row = row_of(tmp_path, TaskConfig(label="class", protocol="stratified", test_share=0.3), lambda i: "ab"[i % 2])
    both, alone = (score_baselines(row, seeds, (1.5,)) for seeds in ([0, 3], [3]))
    for name in (LOG_MEL, bag_of_codes(1.5)):
        first, second = both[name]["seeds"]
        assert second == alone[name]["seeds"][0] and (first["seed"], second["seed"]) == (0, 3)
        assert first["confusion"] != second["confusion"]
    assert both[LOG_MEL]["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in both[LOG_MEL]["seeds"]]))


def test_classes_are_those_of_what_is_divided_as_the_cells_are(tmp_path):
    names = [f"{i:04d}.wav" for i in range(40) if i % 4]  # none of class a
    parts = {"train": names[:15], "valid": names[15:22], "test": names[22:]}
    lists = {side: str(write_list(tmp_path, "\n".join(part), f"{side}.txt")) for side, part in parts.items()}
    task = TaskConfig(label="class", protocol="lists", lists=ListsConfig(**lists))
    found = score_baselines(row_of(tmp_path, task, lambda i: "abcd"[i % 4]), [0], (1.5,))
    for name in (LOG_MEL, CHANCE):
        (result,) = found[name]["seeds"]
        assert result["classes"] == ["b", "c", "d"]
        truth = np.array(result["confusion"]).sum(axis=1)
        wanted = [sum("abcd"[int(part[:4]) % 4] == label for part in parts["test"]) for label in "bcd"]
        assert truth.tolist() == wanted


def test_folds_are_pooled_so_that_each_recording_is_tested_once(tmp_path):
    task = TaskConfig(label="class", protocol="folds", folds=4, fold=1)
    row = row_of(tmp_path, task, lambda i: "ab"[i % 2])
    found = score_baselines(row, [0, 1], (1.5,))
    for name in (LOG_MEL, bag_of_codes(1.5), CHANCE):
        assert found[name]["count"] == 40
        assert [np.array(result["confusion"]).sum(axis=1).tolist() for result in found[name]["seeds"]] == [[20, 20]] * 2
