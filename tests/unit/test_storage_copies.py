"""Files copied to a store and back: block by block, all or nothing, and deleted again."""

import hashlib
import stat
import tracemalloc

import pytest
from support import largest_file

from megascale import storage
from megascale.errors import Stopped, StorageError


def test_file_is_uploaded_sized_read_in_blocks_and_deleted_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 4)
    (tmp_path / "from").write_bytes(b"from")
    (tmp_path / "empty").touch()
    for top in (str(tmp_path / "to"), f"memory:/{tmp_path}/to"):
        assert storage.sizes(top) == {}
        storage.upload(tmp_path / "from", f"{top}/a/b")
        storage.upload(tmp_path / "empty", f"{top}/c")
        storage.upload(tmp_path / "from", f"{top}/c")
        storage.upload(tmp_path / "empty", f"{top}/d")
        assert storage.sizes(top) == {"a/b": 4, "c": 4, "d": 0}
        storage.publish_bytes(f"{top}/c", b"123456789")
        assert list(storage.read_blocks(f"{top}/c")) == [b"1234", b"5678", b"9"]
        assert list(storage.read_blocks(f"{top}/d")) == []
        with pytest.raises(StorageError, match=f"^{top}/none: no such file$"):
            next(storage.read_blocks(f"{top}/none"))
        for name in ("c", "a", "none"):
            storage.delete(f"{top}/{name}")
        assert storage.sizes(top) == {"d": 0}


def test_upload_of_a_file_that_is_gone_names_the_file(tmp_path):
    for url in (str(tmp_path / "to"), f"memory:/{tmp_path}/to"):
        with pytest.raises(StorageError, match=f"^{tmp_path}/gone: no such file$"):
            storage.upload(tmp_path / "gone", url)
        assert not storage.exists(url)


def test_upload_to_a_full_disk_leaves_nothing(tmp_path):
    (tmp_path / "from").write_bytes(bytes(10_000))
    with largest_file(5_000), pytest.raises(StorageError, match=f"^{tmp_path}/to/x: cannot write: "):
        storage.upload(tmp_path / "from", str(tmp_path / "to" / "x"))
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 35])
def test_download_in_blocks_is_the_file(tmp_path, monkeypatch, size):
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 10)
    data, copy = bytes(range(size)), tmp_path / "deep" / "copy"
    for url in (str(tmp_path / "x"), f"memory:/{tmp_path}/x"):
        storage.publish_bytes(url, data)
        assert storage.download(url, copy) is True
        assert copy.read_bytes() == data
        assert storage.download(url, copy, num_bytes=size // 2) is True
        assert copy.read_bytes() == data[: size // 2]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o644
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_download_holds_no_more_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_BLOCK_BYTES", 100_000)
    storage.publish_bytes(f"memory:/{tmp_path}/x", bytes(20_000_000))
    tracemalloc.start()
    try:
        storage.download(f"memory:/{tmp_path}/x", tmp_path / "copy")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert (tmp_path / "copy").stat().st_size == 20_000_000


def test_download_of_other_bytes_than_were_asked_for_writes_nothing(tmp_path):
    url, copy = f"memory:/{tmp_path}/x", tmp_path / "copy"
    storage.publish_bytes(url, b"data")
    assert storage.download(url, copy, sha256=hashlib.sha256(b"data").hexdigest()) is True
    storage.publish_bytes(url, b"Data")
    assert storage.download(url, copy, sha256=hashlib.sha256(b"data").hexdigest()) is False
    with pytest.raises(StorageError, match=f"^{url}: ends after 4 bytes, 5 were expected$"):
        storage.download(url, copy, num_bytes=5)
    assert copy.read_bytes() == b"data"
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_download_that_cannot_end_leaves_nothing_and_says_why(tmp_path):
    url, copy = f"memory:/{tmp_path}/x", tmp_path / "copy"
    with pytest.raises(StorageError, match=f"^{url}: no such file$"):
        storage.download(url, copy)
    storage.publish_bytes(url, bytes(1_000_000))
    with largest_file(4096), pytest.raises(StorageError, match=f"^{copy}: cannot write: File too large$"):
        storage.download(url, copy)

    def stop() -> None:
        raise Stopped("stopped by SIGTERM")

    with pytest.raises(Stopped):
        storage.download(url, copy, check=stop)
    assert list(tmp_path.iterdir()) == []
