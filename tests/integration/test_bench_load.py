"""The loading benchmark at a tiny size: every way gives the same codes, and what is written says what was measured."""

import json

from megascale.bench import load


def test_every_way_is_timed_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = load.Sizes(
        clips=(64, 32), rival_clips=32, clips_per_shard=8, batch=16, frames=30, stored_frames=35, repeats=2
    )
    path = load.run(2, sizes)
    assert path.resolve() == tmp_path / "runs" / "bench" / "load.json"
    found = json.loads(path.read_text())
    names = [f"Q={q} {name}" for q in (2, 16) for name in load.THINGS]
    assert list(found["clips_per_core_second"]) == names
    assert all(len(rates) == 2 and min(rates) > 0 for rates in found["clips_per_core_second"].values())
    assert len(found["ratios"]) == 2 * 6
    assert "Q=2 resident, codes / webdataset .npy" in found["ratios"]
    assert "Q=16 streaming, codes, cold / webdataset .npy, cold" in found["ratios"]
    assert found["sizes"]["frames"] == 30
    assert found["versions"].keys() == {"torch", "numpy", "webdataset"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert [p.name for p in path.parent.iterdir()] == ["load.json"], "the clips are gone"
