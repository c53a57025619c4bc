"""Split lists: names match recordings by the end of their path, and what cannot be meant is refused."""

from pathlib import Path

import fsspec
import pytest

from megascale.downstream.split_lists import ListsConfig, match_lists
from megascale.errors import DataError, StorageError

SIDES = ("train", "valid", "test")


def write(folder: Path, *texts: str) -> ListsConfig:
    for side, text in zip(SIDES, texts, strict=True):
        (folder / f"{side}.txt").write_text(text)
    return ListsConfig(**{side: str(folder / f"{side}.txt") for side in SIDES})


def refusal(config: ListsConfig, *sources: str) -> str:
    with pytest.raises(DataError) as failure:
        match_lists(config, sources)
    return str(failure.value)


@pytest.mark.parametrize("prefix", ["", "genres/", "Data/genres_original/"])
def test_names_match_by_the_end_of_the_path(tmp_path, prefix):
    config = write(tmp_path, "blues/blues.00029.wav\n", "blues/blues.00000.wav\n", "jazz/jazz.00001.wav\n")
    names = ("blues/blues.00029.wav", "blues/blues.00000.wav", "jazz/jazz.00001.wav")
    side_of, missing = match_lists(config, [f"{prefix}{name}" for name in (*names, "jazz/jazz.00002.wav")])
    assert side_of == {f"{prefix}{name}": side for name, side in zip(names, SIDES, strict=True)}
    assert missing == []


def test_part_of_a_name_is_no_match(tmp_path):
    config = write(tmp_path, "lues/a.wav\n", "b.wa\n", "x/blues/c.wav\n")
    assert match_lists(config, ["blues/a.wav", "blues/b.wav", "blues/c.wav"]) == (
        {},
        ["lues/a.wav", "b.wa", "x/blues/c.wav"],
    )


def test_files_that_the_corpus_lacks_are_returned_in_their_order(tmp_path):
    config = write(tmp_path, "a.wav\nz.wav\n", "b.wav\n", "y.wav\nc.wav\n")
    assert match_lists(config, ["a.wav", "b.wav", "c.wav"])[1] == ["z.wav", "y.wav"]


def test_comments_blank_lines_line_ends_and_repeats_are_read_over(tmp_path):
    config = write(tmp_path, "\ufeff# which\r\n\r\n./a.wav \r\na.wav\r\n", "b.wav", "\nc.wav\n")
    assert match_lists(config, ["a.wav", "b.wav", "c.wav"]) == (
        {"a.wav": "train", "b.wav": "valid", "c.wav": "test"},
        [],
    )


@pytest.mark.parametrize("name", ["x/a.wav", "a.wav"])
def test_file_in_two_lists_is_refused_however_it_is_spelled(tmp_path, name):
    config = write(tmp_path, "x/a.wav\n", "b.wav\n", f"c.wav\n{name}\n")
    assert refusal(config, "x/a.wav", "b.wav", "c.wav") == f"{tmp_path}/test.txt: {name!r} is in the train list, too"


def test_file_in_two_lists_is_refused_though_the_corpus_lacks_it(tmp_path):
    config = write(tmp_path, "a.wav\n", "gone.wav\n", "gone.wav\n")
    assert refusal(config, "a.wav") == f"{tmp_path}/test.txt: 'gone.wav' is in the valid list, too"


def test_name_of_several_recordings_is_refused(tmp_path):
    config = write(tmp_path, "a.wav\n", "b.wav\n", "c.wav\n")
    assert refusal(config, "x/a.wav", "y/a.wav", "b.wav", "c.wav") == (
        f"{tmp_path}/train.txt: 'a.wav' fits several recordings, such as 'x/a.wav' and 'y/a.wav'"
    )


def test_lists_are_read_from_any_url_and_a_missing_one_is_named():
    for side in SIDES:
        with fsspec.open(f"memory://lists/{side}.txt", "w") as file:
            file.write(f"{side}.wav\n")
    config = ListsConfig(**{side: f"memory://lists/{side}.txt" for side in SIDES})
    assert match_lists(config, ["train.wav", "valid.wav", "test.wav"])[0] == {f"{side}.wav": side for side in SIDES}
    gone = config.model_copy(update={"test": "memory://lists/gone.txt"})
    with pytest.raises(StorageError, match=r"^memory://lists/gone\.txt: "):
        match_lists(gone, [])
