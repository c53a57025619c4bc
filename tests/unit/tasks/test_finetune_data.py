"""Batches for fine-tuning are functions of seed, epoch and clip, and scoring sees every clip once and whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import write_token_folder

from megascale.config import validate
from megascale.errors import StorageError
from megascale.tasks import finetune
from megascale.tasks.finetune_config import FinetuneConfig
from megascale.tasks.finetune_data import Batches, open_clips

FRAMES = [30 + i % 7 for i in range(40)]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_token_folder(folder, 40, frames=FRAMES)
    return folder


def config_of(tokens: Path, **sections: Any) -> FinetuneConfig:
    tree = {
        "data": {"url": str(tokens)},
        "task": {"label": "class", "protocol": "official"},
        "arm": "ft_aug",
        "checkpoint": "none",
        "train": {"epochs": 2, "batch": 6, "crop_seconds": 0.25, "eval_batch": 4},
        "drop": {"p": 1.0, "min_share": 0.2, "max_share": 0.2},
        "output": {"url": "none"},
    }
    return validate(FinetuneConfig, "finetune", tree | sections)


def batches_of(config: FinetuneConfig) -> Batches:
    return Batches(config, open_clips(config))


def equal(one: list[list[dict]], other: list[list[dict]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for (a,), (b,) in zip(one, other, strict=True)
    )


def test_every_epoch_is_drawn_anew(tokens):
    batches = batches_of(config_of(tokens, train={"epochs": 3, "batch": 6, "crop_seconds": 0.25}))
    drawn, again = list(batches.train()), list(batches.train())
    assert len(drawn) == 3 * batches.per_epoch == 3 * (20 // 6)
    assert equal(drawn, again)
    assert not equal(drawn[: batches.per_epoch], drawn[batches.per_epoch : 2 * batches.per_epoch])


def test_chunks_are_dropped_in_one_arm_alone(tokens):
    dropped = list(batches_of(config_of(tokens)).train())
    plain = list(batches_of(config_of(tokens, arm="ft")).train())
    crop = round(0.25 * 75)
    assert {batch["codes_BTQ"].shape[1] for (batch,) in plain} == {crop}
    assert {batch["codes_BTQ"].shape[1] for (batch,) in dropped} == {crop - round(0.2 * crop)}
    for (one,), (other,) in zip(dropped, plain, strict=True):
        assert torch.equal(one["targets_B"], other["targets_B"]), "the same clips in the same order"


def test_every_arm_sees_the_same_clips(tokens):
    arms = [list(batches_of(config_of(tokens, arm=arm)).train()) for arm in ("scratch", "probe", "ft")]
    assert equal(arms[0], arms[1]) and equal(arms[0], arms[2])


def test_scoring_sees_each_clip_once_and_whole(tokens):
    config = config_of(tokens)
    data = open_clips(config)
    seen: list[int] = []
    for chosen, batch in Batches(config, data).whole(data.splits["test"]):
        seen += chosen
        assert len(chosen) <= 4
        for row, clip in enumerate(chosen):
            frames = FRAMES[clip]
            codes_TQ = torch.from_numpy(data.clips[clip].codes_QT.T.astype("int64"))
            assert torch.equal(batch["codes_BTQ"][row, :frames], codes_TQ)
            assert batch["codes_BTQ"].shape[1] == frames or int(batch["valid_BT"][row].sum()) == frames
    assert sorted(seen) == data.splits["test"]


def test_second_folder_is_the_test_split_and_leaks_are_looked_for_across_both(tokens, tmp_path):
    """The first folder's own 10 test clips are in no split; the second repeats its clips 0 to 9, of which 2 are test clips."""
    write_token_folder(tmp_path / "other", 10, frames=FRAMES[:10])
    data = open_clips(config_of(tokens, data={"url": str(tokens), "test_url": str(tmp_path / "other")}))
    assert {name: len(members) for name, members in data.splits.items()} == {"train": 20, "valid": 10, "test": 10}
    assert [data.clips[i].key for i in data.splits["test"]] == [f"clip-{i:04d}" for i in range(10)]
    found = data.split_check
    assert found["recordings"] == {"train": 20, "valid": 10, "test": 10}
    assert found["recordings_on_two_sides"]["train-test"] == 6 and found["recordings_on_two_sides"]["valid-test"] == 2
    assert found["equal_codes_on_two_sides"]["train-test"] == 6


def test_missing_list_is_told_before_a_clip_is_read(tokens, tmp_path):
    """The table checks so, before it starts anything."""
    urls = {side: str(tmp_path / f"{side}.txt") for side in ("train", "valid", "test")}
    task = {"label": "class", "protocol": "lists", "lists": urls}
    with pytest.raises(StorageError, match=r"train\.txt: no such file"):
        finetune.check(config_of(tokens, task=task))
