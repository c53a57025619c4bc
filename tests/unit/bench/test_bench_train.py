"""`make bench-train`: rivals compute what they say, with the same operations per layer; a tiny run ends with its files.

The peers are installed by the benchmark alone, so tests of theirs run only where it has been."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megascale.bench import rivals, train
from megascale.bench.rivals import FLAT, MEGABYTE, MEGABYTE_DEFAULT, MODERNBERT, OURS, PLAIN
from megascale.model.config import ModelConfig
from megascale.model.cost import Work, training_flops

ROOT = Path(__file__).resolve().parents[3]
TINY = {
    "width": 64, "heads": 2, "mlp_width": 128, "local_layers": 2, "local_width": 32, "local_heads": 2, "local_mlp_width": 64
}  # fmt: skip
PEERS = [
    pytest.param(
        name, marks=pytest.mark.skipif(name not in rivals.installed(), reason="not installed: make bench-train")
    )
    for name in (MODERNBERT, MEGABYTE, MEGABYTE_DEFAULT)
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_codebooks", [2, 16])
def test_plain_computation_has_the_same_loss(num_codebooks):
    ours = rivals.build(OURS, ModelConfig(layers=1, **TINY), num_codebooks, 20)
    batch = train.draw_batch(2, 20, num_codebooks)
    assert batch["masked_BTQ"].sum(dim=1).eq(5).all()
    assert torch.allclose(rivals.plain(ours.model).loss(batch), ours.loss(batch), rtol=1e-5)  # sums in another order


def test_flat_loss_is_that_of_masked_tokens_and_sees_no_masked_code():
    flat = rivals.build(FLAT, ModelConfig(layers=1, **TINY), 2, 8).model
    batch = train.draw_batch(1, 8, 2)
    codes, masked = batch["codes_BTQ"], batch["masked_BTQ"]
    caught = []
    flat.norm.register_forward_hook(lambda module, x, y: caught.append(y.view(1, 8, 2, -1)))
    loss = flat(codes, masked)
    logits = torch.einsum("btqd,qvd->btqv", caught[0], flat.heads_QVD)
    expected = torch.nn.functional.cross_entropy(logits[masked], codes[masked])
    assert torch.allclose(loss, expected, rtol=1e-5)
    flat(torch.where(masked, 3, codes), masked)
    assert torch.equal(caught[0], caught[1])
    flat(torch.where(masked, codes, 3), masked)
    assert not torch.equal(caught[0], caught[2])


@pytest.mark.parametrize("name", [OURS, FLAT, *PEERS])
def test_every_rival_learns_its_batch(name):
    rival = rivals.build(name, ModelConfig(layers=3, **TINY), 4, 12)
    batch = train.draw_batch(1, 12, 4)
    step = torch.optim.AdamW(rival.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = rival.loss(batch)
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", [OURS, FLAT, *PEERS])
def test_layers_of_all_rivals_cost_the_same(name):
    """Products of a layer and token; scores of fused attention are not counted, and written out they are taken off."""
    num_frames, num_codebooks = 12, 4
    batch = train.draw_batch(1, num_frames, num_codebooks)

    def counted(**sizes: int) -> int:
        with FlopCounterMode(display=False) as counter:
            rivals.build(name, ModelConfig(**(TINY | sizes)), num_codebooks, num_frames).loss(batch)
        return counter.get_total_flops()

    layer = 2 * (4 * 64**2 + 3 * 64 * 128)
    tokens = {OURS: num_frames, FLAT: 48, MODERNBERT: 48}.get(name, num_frames + 1)  # MEGABYTE has a start token
    scores = 2 * 2 * 64 * tokens**2 if name == MEGABYTE_DEFAULT else 0
    assert counted(layers=4) - counted(layers=3) == layer * tokens + scores
    if name in (MEGABYTE, MEGABYTE_DEFAULT):
        local, each = 2 * (4 * 32**2 + 3 * 32 * 64), num_frames * (num_codebooks + 1)
        scores = 2 * 2 * 32 * each * (num_codebooks + 1) if name == MEGABYTE_DEFAULT else 0
        assert counted(layers=1, local_layers=3) - counted(layers=1) == local * each + scores


def test_tiny_run_writes_table_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = train.Plan(
        ModelConfig(layers=1, **TINY), table=((2, 8), (4, 6)), lengths=(4, 8), codebooks=(2, 4), codebooks_frames=4
    )
    facts = json.loads(train.run(rounds=2, plan=plan).read_text())
    assert facts["rounds"] == 2
    for entry, sizes in zip(facts["table"], plan.table, strict=True):
        assert (entry["codebooks"], entry["frames"]) == sizes
        assert {OURS, PLAIN, FLAT} < set(entry["seconds"])
        assert all(len(values) == 2 and min(values) > 0 for values in entry["seconds"].values())
        assert {PLAIN, FLAT, "local stage, computed plainly"} <= set(entry["times_ours"])
        assert entry["operations_times_ours"].keys() == entry["times_ours"].keys()
        assert min(entry["operations_times_ours"].values()) > 1, "every rival computes more"
        if MEGABYTE in entry["operations"]:  # its own way to fused attention is counted like the other
            assert entry["operations"][MEGABYTE] == entry["operations"][MEGABYTE_DEFAULT]
        num_codebooks, num_frames = sizes
        masked_BTQ = train.draw_batch(1, num_frames, num_codebooks)["masked_BTQ"]
        work = Work(num_frames, num_frames**2, float(masked_BTQ.any(dim=-1).sum()), float(masked_BTQ.sum()))
        if num_codebooks > 2:  # attention between two tokens is no matrix product, and is not counted by torch
            assert entry["operations"][OURS] == training_flops(plan.model, num_codebooks, work)
    assert [point["frames"] for point in facts["by_length"]] == [4, 8]
    assert [point["codebooks"] for point in facts["by_codebooks"]] == [2, 4]
    assert facts["versions"]["torch"] == torch.__version__
    for name in ("train-length", "train-codebooks"):
        assert (tmp_path / "runs" / "bench" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Q = 4, T = 6" in printed
    assert "flat Transformer" in printed


def test_peers_of_the_make_target_are_those_of_the_extra_and_pinned():
    makefile = (ROOT / "Makefile").read_text()
    listed = next(line for line in makefile.splitlines() if line.startswith("PEERS :=")).split()[2:]
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    assert sorted(listed) == sorted(requirement.split(">=")[0] for requirement in extra)
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(listed) <= pinned
