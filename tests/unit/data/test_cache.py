"""A remote token folder's shards on a local disk: bounded, fetched ahead and once, checked, and never in the way."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from stores import HookedStore, hooked_copy, wait_until
from support import write_token_folder

from megascale import storage
from megascale.data import cache
from megascale.data.cache import ShardCache
from megascale.data.folder import TokenFolder
from megascale.data.index import ShardFacts, read_manifest
from megascale.errors import DataError, StorageError

NUM_SHARDS = 6


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Six shards of 8 clips, all of one size."""
    path = tmp_path_factory.mktemp("tokens")
    write_token_folder(path, 8 * NUM_SHARDS, frames=20)
    return path


@pytest.fixture
def url(stored) -> Iterator[str]:
    with hooked_copy(stored) as url:
        yield url


@pytest.fixture
def shards(url) -> list[ShardFacts]:
    found = read_manifest(url).shards
    assert len({facts.size for facts in found}) == 1
    return found


@pytest.fixture
def open_cache(url, shards, tmp_path) -> Iterator[Callable[..., ShardCache]]:
    """Open caches that are closed after the test: a bound in shards, and a folder."""
    opened: list[ShardCache] = []

    def open_cache(bound: float, folder: str | None = str(tmp_path / "cache")) -> ShardCache:
        opened.append(ShardCache(url, shards, folder, int(bound * shards[0].size)))
        return opened[-1]

    yield open_cache
    for each in opened:
        each.close()


@pytest.fixture
def fetched() -> Counter[str]:
    """How often each shard is fetched from here on."""
    count: Counter[str] = Counter()
    HookedStore.hook = staticmethod(lambda name: count.update([name]) if name.endswith(".tar") else None)
    return count


def bytes_in(folder: Path) -> int:
    sizes = 0
    for entry in os.scandir(folder):
        try:
            sizes += entry.stat().st_size
        except FileNotFoundError:  # renamed or removed meanwhile
            continue
    return sizes


def numbers_in(folder: Path, shards: list[ShardFacts]) -> set[int]:
    return {number for number, facts in enumerate(shards) if (folder / f"{facts.sha256}.tar").exists()}


def whole(store: ShardCache, number: int, shards: list[ShardFacts]) -> bytes:
    return store.read_many([number], [0], [shards[number].size])[0]


def expect(store: ShardCache, number: int, shards: list[ShardFacts], stored: Path) -> None:
    assert whole(store, number, shards) == (stored / shards[number].name).read_bytes()


def test_any_stretch_of_any_shard_is_read_and_each_is_fetched_once(open_cache, stored, shards, fetched):
    store = open_cache(NUM_SHARDS)
    for number in (5, 0, 3, 5, 1, 2, 4, 0):
        expect(store, number, shards, stored)
        assert store.read_many([number], [700], [31]) == [(stored / shards[number].name).read_bytes()[700:731]]
    assert fetched == {facts.name: 1 for facts in shards}


@pytest.mark.parametrize("bound", [0.5, 1, 2.5, 4])
def test_disk_never_holds_more_than_the_bound_and_nothing_is_read_wrong(
    open_cache, stored, shards, tmp_path, bound, monkeypatch
):
    """Two readers, and four threads that fetch ahead; the disk is looked at before each download and after each read."""
    store, most, seen = open_cache(bound), max(1, int(bound)) * shards[0].size, []
    (tmp_path / "cache").mkdir()
    HookedStore.hook = staticmethod(lambda name: seen.append(bytes_in(tmp_path / "cache")))

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in rng.integers(0, NUM_SHARDS, 60):
            store.want([int(number), *rng.permutation(NUM_SHARDS).tolist()], ("sweep", "steps")[seed % 2])
            expect(store, int(number), shards, stored)
            seen.append(bytes_in(tmp_path / "cache"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(2)))
    assert len(seen) > 120
    assert max(seen) <= most


@pytest.mark.parametrize("bound", [0.5, 1, 3])
def test_many_stretches_of_many_shards_are_read_at_once_though_few_shards_fit(
    open_cache, stored, shards, tmp_path, bound
):
    """Two readers take each other's shards away, and threads fetch ahead."""
    store, data = open_cache(bound), [(stored / facts.name).read_bytes() for facts in shards]

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(8):
            numbers, sizes = rng.integers(0, NUM_SHARDS, 40).tolist(), rng.integers(1, 200, 40).tolist()
            offsets = [int(rng.integers(0, shards[0].size - size)) for size in sizes]
            store.want(rng.permutation(NUM_SHARDS).tolist(), ("sweep", "steps")[seed % 2])
            pieces = store.read_many(numbers, offsets, sizes)
            expected = [data[n][at : at + size] for n, at, size in zip(numbers, offsets, sizes, strict=True)]
            assert pieces == expected

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, range(2)))
    assert bytes_in(tmp_path / "cache") <= max(1, int(bound)) * shards[0].size


@pytest.mark.parametrize("most_mapped", [1, NUM_SHARDS])
def test_what_was_read_of_a_local_folder_stays_when_its_shards_are_unmapped(stored, monkeypatch, most_mapped):
    monkeypatch.setattr(cache, "_MAX_MAPPED", most_mapped)
    shards = read_manifest(str(stored)).shards
    store = cache.LocalShards(str(stored), shards)
    numbers = [5, 0, 3, 0, 5]
    pieces = store.read_many(numbers, [512] * 5, [300] * 5)
    store.close()
    assert [bytes(p) for p in pieces] == [(stored / shards[n].name).read_bytes()[512:812] for n in numbers]
    assert bytes(store.read_many([1], [0], [10])[0]) == (stored / shards[1].name).read_bytes()[:10], (
        "and is mapped again"
    )


def test_room_is_made_by_the_least_recently_used_and_its_disk_is_free_at_once(open_cache, stored, shards, tmp_path):
    store, folder = open_cache(3), tmp_path / "cache"
    for number in (0, 1, 2, 0, 3):
        expect(store, number, shards, stored)
    assert numbers_in(folder, shards) == {0, 2, 3}
    expect(store, 4, shards, stored)
    assert numbers_in(folder, shards) == {0, 3, 4}
    assert not [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line and "del" in line
    ]


def test_what_is_wanted_is_kept_though_it_was_used_least_recently(open_cache, stored, shards, tmp_path, fetched):
    store = open_cache(4)
    store.want([0, 1])
    wait_until(lambda: numbers_in(tmp_path / "cache", shards) == {0, 1})
    for number in (2, 3, 4, 5, 2):
        expect(store, number, shards, stored)
    assert {0, 1} < numbers_in(tmp_path / "cache", shards)
    assert (fetched[shards[0].name], fetched[shards[1].name]) == (1, 1)


def test_shards_come_ahead_in_order_of_need_and_no_more_of_them_than_the_bound_allows(
    open_cache, shards, tmp_path, fetched, monkeypatch
):
    monkeypatch.setattr(cache, "_THREADS", 1)
    order = []
    HookedStore.hook = staticmethod(order.append)
    store = open_cache(7)
    store.want([4, 1, 0, 2, 3])  # half the bound is three shards
    wait_until(lambda: numbers_in(tmp_path / "cache", shards) == {0, 1, 4})
    store.want([5, 3, 0, 2])
    wait_until(lambda: numbers_in(tmp_path / "cache", shards) == {0, 1, 3, 4, 5})
    assert order == [shards[n].name for n in (4, 1, 0, 5, 3)]


def test_a_read_waits_for_the_download_that_is_on_its_way(open_cache, stored, shards, fetched):
    started, go_on = threading.Event(), threading.Event()
    count = HookedStore.hook

    def hold(name: str) -> None:
        count(name)
        started.set()
        assert go_on.wait(30)

    HookedStore.hook = staticmethod(hold)
    store = open_cache(4)
    store.want([2])
    assert started.wait(30)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(expect, store, 2, shards, stored)
        go_on.set()
        read.result(30)
    assert fetched == {shards[2].name: 1}


@pytest.mark.parametrize("bound", [0.5, 1])
def test_bound_of_one_shard_or_less_still_works_one_shard_at_a_time(
    open_cache, stored, shards, bound, tmp_path, fetched
):
    store = open_cache(bound)
    for number in (0, 1, 0, 2):
        store.want([0, 1, 2])
        for _ in range(2):
            expect(store, number, shards, stored)
            assert numbers_in(tmp_path / "cache", shards) == {number}
    assert fetched.total() == 4


def test_what_is_wanted_makes_room_for_a_large_shard_that_is_needed_at_once(tmp_path):
    codes = np.random.default_rng(0).integers(0, 1024, (9, 2, 400))
    write_token_folder(tmp_path / "tokens", 9, frames=400, codes=codes)  # eight clips, and one
    with hooked_copy(tmp_path / "tokens") as url:
        large, small = read_manifest(url).shards
        assert 2 * small.size < large.size
        store = ShardCache(url, [large, small], str(tmp_path / "cache"), large.size + small.size - 1)
        store.want([1])
        wait_until(lambda: (tmp_path / "cache" / f"{small.sha256}.tar").exists())
        expect(store, 0, [large, small], tmp_path / "tokens")
        assert numbers_in(tmp_path / "cache", [large, small]) == {0}
        store.close()


def test_downloads_end_when_the_cache_is_closed_and_leave_nothing(open_cache, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 1000)
    started, go_on = threading.Event(), threading.Event()
    HookedStore.hook = staticmethod(lambda name: (started.set(), go_on.wait(30)))
    store = open_cache(4)
    store.want([0])
    assert started.wait(30)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(store.close)
        wait_until(lambda: store._closed)
        go_on.set()
        closing.result(30)
    assert not any(thread.is_alive() for thread in store._threads)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("how", ["cut", "longer", "empty", "changed"])
def test_damaged_file_in_the_folder_is_fetched_again(open_cache, stored, shards, tmp_path, fetched, how, ahead):
    whole_shard = (stored / shards[1].name).read_bytes()
    damaged = {"cut": whole_shard[:-1], "longer": whole_shard + b"\0", "empty": b"", "changed": b"\1" + whole_shard[1:]}
    path = tmp_path / "cache" / f"{shards[1].sha256}.tar"
    storage.publish_bytes(str(path), damaged[how])
    count = HookedStore.hook

    def hook(name: str) -> None:
        count(name)
        assert not path.exists(), "it takes no room beside its successor"

    HookedStore.hook = staticmethod(hook)
    store = open_cache(2)
    if ahead:
        store.want([1])
        wait_until(lambda: fetched[shards[1].name] == 1)
    for _ in range(2):
        expect(store, 1, shards, stored)
    assert fetched == {shards[1].name: 1}


@pytest.mark.parametrize("ahead", [False, True])
def test_damage_in_the_store_is_an_error_where_the_shard_is_read_and_named_by_url(
    open_cache, url, stored, shards, ahead
):
    data = (stored / shards[1].name).read_bytes()
    storage.publish_bytes(f"{url}/{shards[1].name}", data[:600] + bytes([data[600] ^ 1]) + data[601:])
    store = open_cache(4)
    if ahead:
        store.want([1, 0])
        wait_until(lambda: store._failed.keys() == {1})
    expect(store, 0, shards, stored)
    for _ in range(2):
        with pytest.raises(DataError, match=f"^{url}/{shards[1].name}: its sha256 is not the one in the manifest"):
            whole(store, 1, shards)
    storage.publish_bytes(f"{url}/{shards[1].name}", data)
    expect(store, 1, shards, stored)


def test_shards_that_are_missing_or_cut_in_the_store_are_named_by_url(open_cache, url, stored, shards, tmp_path):
    store = open_cache(4)
    HookedStore.store.pop(f"/folder/{shards[0].name}")
    storage.publish_bytes(f"{url}/{shards[1].name}", (stored / shards[1].name).read_bytes()[:1000])
    for number, reason in ((0, "no such file"), (1, f"ends after 1000 bytes, {shards[1].size} were expected")):
        with pytest.raises(StorageError, match=f"^{url}/{shards[number].name}: {reason}$"):
            whole(store, number, shards)
    expect(store, 2, shards, stored)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{shards[2].sha256}.tar"]


def test_failure_of_a_fetch_ahead_that_has_passed_is_no_error(open_cache, url, stored, shards):
    data = HookedStore.store.pop(f"/folder/{shards[1].name}")
    store = open_cache(4)
    store.want([1])
    wait_until(lambda: store._failed.keys() == {1})
    HookedStore.store[f"/folder/{shards[1].name}"] = data
    expect(store, 1, shards, stored)


def test_files_of_an_earlier_process_are_used_counted_and_the_oldest_removed(
    open_cache, stored, shards, tmp_path, fetched
):
    folder = tmp_path / "cache"
    first = open_cache(NUM_SHARDS)
    for number in (3, 1, 0, 4):
        expect(first, number, shards, stored)
        os.utime(folder / f"{shards[number].sha256}.tar", (sum(fetched.values()),) * 2)
    first.close()
    (folder / "others.tar").write_bytes(b"not a shard")
    (folder / f"{shards[5].sha256}.tar").write_bytes(b"not the size of a shard")
    (folder / f".{shards[5].sha256}.tar.x1.part").write_bytes(b"of a process that was killed")
    second = open_cache(3)
    expect(second, 0, shards, stored)
    assert numbers_in(folder, shards) == {0, 1, 4}
    assert not list(folder.glob(".*"))
    assert len(list(folder.glob("*"))) == 4 and (folder / "others.tar").exists()
    expect(second, 2, shards, stored)
    assert numbers_in(folder, shards) == {0, 2, 4}
    expect(second, 4, shards, stored)
    assert fetched == {shards[n].name: 1 for n in (0, 1, 2, 3, 4)}


def test_two_processes_share_a_folder(open_cache, stored, shards, tmp_path, fetched, monkeypatch):
    monkeypatch.setattr(cache, "_MAX_MAPPED", 1)
    one, other = open_cache(NUM_SHARDS), open_cache(1)
    expect(other, 5, shards, stored)
    expect(one, 0, shards, stored)
    expect(one, 1, shards, stored)
    expect(other, 0, shards, stored)
    assert fetched == {shards[n].name: 1 for n in (0, 1, 5)}, "what is there is not fetched"
    expect(other, 1, shards, stored)
    expect(other, 2, shards, stored)
    assert numbers_in(tmp_path / "cache", shards) == {2}
    expect(one, 1, shards, stored)
    assert fetched[shards[1].name] == 1, "removed, but still mapped"
    expect(one, 0, shards, stored)
    assert fetched[shards[0].name] == 2, "removed and not mapped"


def test_few_shards_are_open_at_a_time(open_cache, stored, shards, monkeypatch):
    monkeypatch.setattr(cache, "_MAX_MAPPED", 2)
    store = open_cache(NUM_SHARDS)
    expect(store, 0, shards, stored)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in (*range(NUM_SHARDS), 3, 0):
        expect(store, number, shards, stored)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_folder_that_cannot_be_made_and_disk_that_is_full_are_named(url, shards, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = ShardCache(url, shards, str(tmp_path / "file" / "cache"), 10**9)
    with pytest.raises(StorageError, match=f"^{tmp_path}/file/cache: cannot keep shards there: Not a directory$"):
        whole(store, 0, shards)


def test_temporary_folder_is_empty_when_the_folder_is_closed(url, stored, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    threads = threading.active_count()
    folder = TokenFolder(url, 1.5)
    assert list(tmp_path.iterdir()) == [], "nothing is written before a shard is read"
    folder.want([1, 2, 3])
    assert folder.whole(np.array([0])).shape == (1, 20, 2)
    assert list(tmp_path.iterdir()) != []
    folder.close()
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads
    with pytest.raises(StorageError, match=f"^{url}: its cache was closed$"):
        folder.whole(np.array([0]))
