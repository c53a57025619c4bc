"""`megascale export` and `megascale embed`: what they write, and what ends them with 2."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from kept_models import write_finetuned, write_run
from support import write_token_folder

from megascale import __main__ as command
from megascale.data.index import read_clips, read_manifest
from megascale.export import MegaAudioFormer, embed_clips

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(capsys, monkeypatch) -> Iterator[Call]:
    monkeypatch.setattr(command, "stop_on_signal", lambda: None)

    def run(*arguments: object) -> tuple[int, str]:
        code = command.main([str(a) for a in arguments])
        return code, "".join(capsys.readouterr())

    yield run


def test_export_writes_the_best_checkpoint_and_says_what(call, tmp_path):
    run = write_run(tmp_path / "run")
    code, printed = call("export", run, tmp_path / "out")
    assert code == 0 and f"{tmp_path / 'out'}: README.md, config.json, model.safetensors" in printed
    kept = run / "checkpoints" / "step-00000010" / "model" / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept.read_bytes()


def test_export_leaves_a_folder_with_something_in_it_alone(call, tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    assert call("export", run, tmp_path / "out")[0] == 0  # an empty one is as good as none
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    code, printed = call("export", run, tmp_path / "out")
    assert code == 2 and "is not empty; choose another" in printed
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_embed_writes_a_row_a_clip_in_the_folders_order(call, tmp_path):
    run, tokens = write_run(tmp_path / "run"), tmp_path / "tokens"
    write_token_folder(tokens, 7, frames=[30, 12, 30, 8, 30, 30, 19])
    assert call("embed", run, tokens, tmp_path / "out.npz", "--batch", 4)[0] == 0
    assert call("embed", run, tokens, tmp_path / "out.parquet", "--batch", 4)[0] == 0
    clips = list(read_clips(str(tokens), read_manifest(str(tokens)), 2))
    expected_ND = embed_clips(MegaAudioFormer.from_pretrained(run).global_encoder, clips, batch=4)
    arrays = np.load(tmp_path / "out.npz", allow_pickle=False)
    assert np.array_equal(arrays["embedding"], expected_ND)
    assert arrays["key"].tolist() == [clip.key for clip in clips]
    assert [json.loads(text) for text in arrays["labels"]] == [clip.labels for clip in clips]
    assert arrays["split"].tolist() == [clip.split for clip in clips]

    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is the extra megascale[parquet]")
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert np.array_equal(np.array(table["embedding"], dtype=np.float32), expected_ND)
    for column in ("key", "recording", "split", "labels"):
        assert table[column] == arrays[column].tolist()


def test_embed_takes_a_classifiers_encoder(call, tmp_path):
    model = write_finetuned(tmp_path / "run")
    write_token_folder(tmp_path / "tokens", 3)
    assert call("embed", tmp_path / "run", tmp_path / "tokens", tmp_path / "out.npz")[0] == 0
    clips = list(read_clips(str(tmp_path / "tokens"), read_manifest(str(tmp_path / "tokens")), 2))
    assert np.array_equal(np.load(tmp_path / "out.npz")["embedding"], embed_clips(model.global_encoder, clips))


def bad_calls(folder: Path) -> list[tuple[list[object], str]]:
    run, tokens, out = folder / "run", folder / "tokens", folder / "out"
    npz = folder / "out.npz"
    return [
        (["export", run], "FOLDER or --push-to-hub NAME says where to"),
        (["export", run, "--push-to-hub", "a/b/c"], "a/b/c: no id of a repo"),
        (["export", folder / "nowhere", out], "nowhere: no such folder"),
        (["export", "https://me:secret@host/run", out], "has credentials in it"),
        (["embed", run, tokens, folder / "out.csv"], "out.csv: ends in neither .npz nor .parquet"),
        (["embed", run, tokens, npz, "--batch", 0], "--batch 0: must be 1 or more"),
        (["embed", run, folder / "nowhere", npz], "nowhere: no manifest.json"),
        (
            ["embed", run, folder / "other", npz],
            f"trained on tokens of codec abababab; {folder / 'other'} holds codec cdcdcdcd",
        ),
        (["embed", run, folder / "thin", npz], "stored with 1 codebooks"),
    ]


def test_bad_input_is_one_line_and_exit_2_and_nothing_is_written(call, tmp_path):
    write_run(tmp_path / "run")
    write_token_folder(tmp_path / "tokens", 2)
    write_token_folder(tmp_path / "other", 2, fingerprint="cd" * 32)
    write_token_folder(tmp_path / "thin", 2, num_codebooks=1)
    before = set(tmp_path.iterdir())
    for arguments, said in bad_calls(tmp_path):
        code, printed = call(*arguments)
        assert code == 2 and said in printed and "secret" not in printed
        assert len(printed.strip().splitlines()) == 1
    assert set(tmp_path.iterdir()) == before
