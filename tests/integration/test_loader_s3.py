"""Batches from S3, on good days and bad ones: those of a local disk, from a bounded cache."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import command, run
from fault_proxy import FaultProxy
from stores import wait_until
from support import write_paced_tokens, write_token_folder

from megascale import storage
from megascale.data.folder import TokenFolder, split_held_out
from megascale.data.loader import Batch, DataConfig, PretrainBatches
from megascale.data.order import Order
from megascale.data.transforms import DropConfig, MaskConfig
from megascale.errors import DataError

NUM_SHARDS, STEPS_PER_EPOCH = 12, 12
URL = "s3://bucket/tokens"


@pytest.fixture(scope="module")
def stored(server, tmp_path_factory) -> Path:
    """96 clips in twelve shards of one size; they lie in the bucket, too."""
    path = tmp_path_factory.mktemp("tokens")
    write_token_folder(path, 8 * NUM_SHARDS, num_codebooks=4, frames=75)
    server.upload(path, "tokens")
    return path


@pytest.fixture
def proxy(server, stored, monkeypatch) -> Iterator[FaultProxy]:
    """Stands before the bucket; shards are downloaded in several blocks."""
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 10_000)
    with FaultProxy(server.endpoint, share=0.0, seed=5, kinds=("500", "503", "cut")) as started:
        storage.configure(storage.StorageConfig(endpoint_url=started.url))
        yield started


def batches_of(folder: TokenFolder, rank: int = 0, world_size: int = 1) -> PretrainBatches:
    train, _, sizes = split_held_out(folder, 0.0)
    order = Order(sizes, seed=6, streams=4, global_batch=8, window=8)
    config = DataConfig(url="", clip_seconds=0.4)
    return PretrainBatches(folder, config, MaskConfig(), DropConfig(p=0.5), order, train, 2, rank, world_size)


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def requests_of(proxy: FaultProxy) -> Counter[str]:
    """How many requests each shard took."""
    return Counter({name: n for name, n in proxy.asked.items() if name.startswith("GET") and name.endswith(".tar")})


@pytest.mark.parametrize("bound", [1, 5])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_batches_are_those_of_a_local_disk_and_the_bound_holds_while_requests_fail(
    stored, proxy, tmp_path, bound, rank, world_size
):
    local = batches_of(TokenFolder(str(stored), 1.5), rank, world_size)
    proxy.share = 0.02
    size = (stored / "tokens-000000.tar").stat().st_size
    folder = TokenFolder(URL, 1.5, str(tmp_path), bound * size / 1e9)
    remote, most = batches_of(folder, rank, world_size), 0
    for step in range(STEPS_PER_EPOCH + 2):
        for expected, got in zip(local.micro_batches(step), remote.micro_batches(step), strict=True):
            assert equal(expected, got)
        most = max(most, sum(path.stat().st_size for path in tmp_path.glob("*.tar")))
    folder.close()
    assert 0 < most <= bound * size
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"
    assert sum(count for kind, count in proxy.done.items() if kind != "good") >= 1


def test_each_shard_is_asked_for_once_and_before_it_is_needed(stored, proxy, tmp_path):
    size = (stored / "tokens-000000.tar").stat().st_size
    folder = TokenFolder(URL, 1.5, str(tmp_path), 3 * NUM_SHARDS * size / 1e9)
    batches = batches_of(folder)
    batches.micro_batches(0)
    wait_until(lambda: len(list(tmp_path.glob("*.tar"))) == NUM_SHARDS)  # 16 steps ahead are all of them
    asked = requests_of(proxy)
    assert len(asked) == NUM_SHARDS and set(asked.values()) == {-(-size // 10_000)}
    for step in range(1, 2 * STEPS_PER_EPOCH):
        batches.micro_batches(step)
    folder.close()
    assert requests_of(proxy) == asked
    again = TokenFolder(URL, 1.5, str(tmp_path), 3 * NUM_SHARDS * size / 1e9)
    batches_of(again).micro_batches(5)
    again.close()
    assert requests_of(proxy) == asked, "what an earlier process fetched is used"


def test_shard_that_was_changed_in_the_bucket_is_named_by_url(server, stored, proxy, tmp_path):
    copy = Path(shutil.copytree(stored, tmp_path / "changed"))
    path = copy / "tokens-000003.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    server.upload(copy, "changed")
    folder = TokenFolder("s3://bucket/changed", 1.5, str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"^s3://bucket/changed/tokens-000003\.tar: its sha256 is not the one"):
        for step in range(STEPS_PER_EPOCH):
            batches_of(folder).micro_batches(step)
    folder.close()


@pytest.mark.parametrize("server", ["moto"], indirect=True)
def test_pretraining_from_a_bucket_gives_the_weights_of_a_local_folder(server, tmp_path):
    write_paced_tokens(tmp_path / "paced", 40)
    server.upload(tmp_path / "paced", "paced")
    smoke = ["configs/pretrain/smoke.yaml", f"storage.endpoint_url={server.endpoint}", "data.valid_share=0.2"]
    found = []
    for name, url in (("local", str(tmp_path / "paced")), ("remote", "s3://bucket/paced")):
        data = [f"data.url={url}", f"data.cache={tmp_path / 'cache'}", "data.cache_gb=1e-4"]
        run(command("pretrain.py", *smoke, *data, f"output.url={tmp_path / name}"))
        weights = next((tmp_path / name / "checkpoints").glob("step-*6/model/model.safetensors"))
        found.append(weights.read_bytes())
    assert found[0] == found[1]
    assert list((tmp_path / "cache").glob("*.tar"))
