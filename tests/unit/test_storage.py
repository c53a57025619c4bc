"""Storage: all or nothing, create-only, and every failure names the URL. (S3 is tested with a server, elsewhere.)"""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support import largest_file

from megascale import storage
from megascale.errors import Stopped, StorageError


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def test_published_bytes_are_read_back_and_folders_appear(tmp_path):
    url = str(tmp_path / "a" / "b" / "x.bin")
    assert storage.publish_bytes(url, b"\0\xff") is True
    assert storage.read_bytes(url) == b"\0\xff"
    assert storage.read_bytes("file://" + url) == b"\0\xff"
    with storage.open_read(url) as file:
        file.seek(1)
        assert file.read() == b"\xff"
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x.bin"]


def test_publish_replaces_what_is_there(tmp_path):
    url = str(tmp_path / "x")
    storage.publish_bytes(url, b"long old content")
    assert storage.publish_bytes(url, b"new") is True
    assert storage.read_bytes(url) == b"new"


def test_published_file_can_be_read_by_a_team(tmp_path):
    storage.publish_bytes(str(tmp_path / "x"), b"1")
    storage.publish_bytes(str(tmp_path / "y"), b"1", create_only=True)
    assert [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in "xy"] == [0o644, 0o644]


def test_create_only_leaves_an_existing_file_alone(tmp_path):
    url = str(tmp_path / "x")
    assert storage.publish_bytes(url, b"first", create_only=True) is True
    assert storage.publish_bytes(url, b"second", create_only=True) is False
    assert storage.read_bytes(url) == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_of_many_create_only_writers_one_wins_whole(tmp_path):
    url = str(tmp_path / "x")
    contents = [bytes([i]) * 100_000 for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda data: storage.publish_bytes(url, data, create_only=True), contents))
    assert won.count(True) == 1
    assert storage.read_bytes(url) == contents[won.index(True)]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("create_only", [False, True])
def test_failed_write_leaves_no_file_and_names_the_url(tmp_path, create_only):
    url = str(tmp_path / "x")
    with largest_file(4096), pytest.raises(StorageError, match=f"^{url}: cannot write: File too large$"):
        storage.publish_bytes(url, bytes(1_000_000), create_only=create_only)
    assert list(tmp_path.iterdir()) == []


def test_what_could_be_written_is_found_out_and_nothing_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path, "file")
    for url in (tmp_path / "folder", tmp_path / "file" / "x", Path("/proc/none/x")):
        with pytest.raises(StorageError, match=f"^{url}: cannot write: "):
            storage.check_writable(str(url))
    old = storage.read_bytes(str(tmp_path / "file"))
    for place in ("file", "new", "a/b/c/new", "folder/new"):
        storage.check_writable(str(tmp_path / place))
    assert storage.read_bytes(str(tmp_path / "file")) == old
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    storage.publish_bytes(f"memory:/{tmp_path}/x", b"old")
    storage.check_writable(f"memory:/{tmp_path}/x")
    assert storage.read_bytes(f"memory:/{tmp_path}/x") == b"old"
    assert list(storage.sizes(f"memory:/{tmp_path}")) == ["x"]
    with pytest.raises(StorageError, match=r"^nonsense://bucket/x\.probe: "):
        storage.check_writable("nonsense://bucket/x")


def test_one_file_is_deleted_and_no_other(tmp_path):
    for folder in (str(tmp_path), f"memory:/{tmp_path}"):
        for name in ("x", "y"):
            storage.publish_bytes(f"{folder}/{name}", b"1")
        storage.delete_file(f"{folder}/x")
        assert storage.sizes(folder) == {"y": 1}
    with pytest.raises(StorageError, match=f"^{tmp_path}/x: no such file$"):
        storage.delete_file(str(tmp_path / "x"))


def test_failed_write_keeps_the_old_file(tmp_path):
    url = str(tmp_path / "x")
    storage.publish_bytes(url, b"old")
    with largest_file(4096), pytest.raises(StorageError):
        storage.publish_bytes(url, bytes(1_000_000))
    assert storage.read_bytes(url) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("create_only", [False, True])
def test_writing_over_a_folder_or_below_a_file_is_refused(tmp_path, create_only):
    (tmp_path / "folder").mkdir()
    write(tmp_path, "file")
    for url in (str(tmp_path / "folder"), str(tmp_path / "file" / "x")):
        with pytest.raises(StorageError, match=f"^{url}: cannot write: "):
            storage.publish_bytes(url, b"1", create_only=create_only)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_missing_file_is_named(tmp_path):
    url = str(tmp_path / "none")
    for read in (storage.read_bytes, storage.read_text, lambda u: storage.open_read(u).__enter__()):
        with pytest.raises(StorageError, match=f"^{url}: no such file$"):
            read(url)
    assert storage.exists(url) is False


def test_folder_read_as_a_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=f"^{tmp_path}: Is a directory$"):
        storage.read_bytes(str(tmp_path))
    assert storage.exists(str(tmp_path)) is True


@contextmanager
def ordinary_user():
    """Root may read everything; be somebody else for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_refused_file_is_named(tmp_path):
    write(tmp_path, "x")
    (tmp_path / "x").chmod(0)
    with ordinary_user(), pytest.raises(StorageError, match="x: permission denied"):
        storage.read_bytes(str(tmp_path / "x"))


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "x").write_bytes(b"caf\xe9")
    with pytest.raises(StorageError, match="x: not UTF-8 text"):
        storage.read_text(str(tmp_path / "x"))
    (tmp_path / "y").write_bytes("café".encode())
    assert storage.read_text(str(tmp_path / "y")) == "café"


@pytest.mark.parametrize("url", ["nonsense://bucket/x", "gs://bucket/x"])
def test_store_that_cannot_be_reached_is_named(url):
    with pytest.raises(StorageError, match=f"^{url}: "):
        storage.read_bytes(url)


def test_error_type_of_a_stores_own_library_is_told_by_url(tmp_path, monkeypatch):
    class NoCredentials(Exception):
        """As botocore's, which is no OSError."""

    def refuse(*arguments, **options):
        raise NoCredentials("Unable to locate credentials")

    for name in ("cat_file", "find", "exists", "pipe_file"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    url = f"memory:/{tmp_path}/x"
    calls = (storage.read_bytes, storage.list_files, storage.exists, lambda u: storage.publish_bytes(u, b""))
    for call in calls:
        with pytest.raises(StorageError, match=f"^{url}: Unable to locate credentials$"):
            call(url)


def test_join_and_local_paths():
    assert storage.join("s3://b/p/", "q", "r") == "s3://b/p/q/r"
    assert storage.join("/", "x") == "/x"
    assert storage.is_local("file:///x")
    assert not storage.is_local("s3://b/x")
    assert str(storage.local_path("file:///x/y")) == "/x/y"
    with pytest.raises(StorageError, match="s3://b/x: a local path is needed here"):
        storage.local_path("s3://b/x")


FILES = ("a.wav", "low/b.wav", "low/c.txt", "high/deep/d.wav")
LISTINGS = [
    ("", "", ["a.wav", "high/deep/d.wav", "low/b.wav", "low/c.txt"]),
    ("low", "low", ["b.wav", "c.txt"]),
    ("*.wav", "", ["a.wav"]),
    ("*/*.wav", "", ["low/b.wav"]),
    ("**/*.wav", "", ["a.wav", "high/deep/d.wav", "low/b.wav"]),
    ("**.wav", "", ["a.wav", "high/deep/d.wav", "low/b.wav"]),
    ("high/**d.wav", "high", ["deep/d.wav"]),
    ("low/*.w?v", "low", ["b.wav"]),
    ("low/[bx].wav", "low", ["b.wav"]),
    ("h*/deep/d.wav", "", ["high/deep/d.wav"]),
    ("high/**/*.wav", "high", ["deep/d.wav"]),
]


@pytest.mark.parametrize(("pattern", "root", "names"), LISTINGS)
def test_listing_has_paths_relative_to_what_the_pattern_fixes(tmp_path, pattern, root, names):
    write(tmp_path, *FILES)
    url = "/".join(part for part in (str(tmp_path), pattern) if part)
    expected_root = "/".join(part for part in (str(tmp_path), root) if part)
    assert storage.list_files(url) == (expected_root, names)


@pytest.mark.parametrize(("pattern", "root", "names"), LISTINGS)
def test_listing_of_another_filesystem_is_the_same(tmp_path, pattern, root, names):
    base = f"memory:/{tmp_path}"  # fsspec's in-memory filesystem, under this test's own name
    for name in FILES:
        storage.publish_bytes(f"{base}/{name}", name.encode())
    url = "/".join(part for part in (base, pattern) if part)
    assert storage.list_files(url) == ("/".join(part for part in (base, root) if part), names)


def test_listing_of_a_file_url_and_a_trailing_slash_is_the_same(tmp_path):
    write(tmp_path, *FILES)
    for url in (f"{tmp_path}/", f"file://{tmp_path}"):
        assert storage.list_files(url)[1] == sorted(FILES)


def test_relative_glob_lists_from_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path, *FILES)
    monkeypatch.chdir(tmp_path)
    assert storage.list_files("*.wav") == (".", ["a.wav"])
    assert storage.list_files("low") == ("low", ["b.wav", "c.txt"])


def test_folder_whose_name_looks_like_a_pattern_is_listed(tmp_path):
    write(tmp_path, "My mix [2020]/a.wav")
    folder = str(tmp_path / "My mix [2020]")
    assert storage.list_files(folder) == (folder, ["a.wav"])


def test_pattern_below_a_folder_whose_name_looks_like_one_is_read_as_a_pattern(tmp_path):
    write(tmp_path, "My mix [2020]/a.wav", "My mix [2020]/b.txt", "My mix 2/c.wav")
    storage.publish_bytes(f"memory:/{tmp_path}/My mix [2020]/a.wav", b"")
    for folder in (f"{tmp_path}/My mix [2020]", f"memory:/{tmp_path}/My mix [2020]"):
        assert storage.list_files(f"{folder}/*.wav") == (folder, ["a.wav"])


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.wav"])
def test_link_that_points_up_does_not_loop(tmp_path, pattern):
    write(tmp_path, "low/a.wav")
    (tmp_path / "low" / "up").symlink_to(tmp_path)
    (tmp_path / "low" / "here").symlink_to(tmp_path / "low")
    assert storage.list_files(f"{tmp_path}{pattern}")[1] == ["low/a.wav"]


@pytest.mark.parametrize("pattern", ["", "/**/*.wav"])
def test_linked_folder_is_listed_once_and_a_real_one_under_its_own_name(tmp_path, pattern):
    write(tmp_path, "corpus/z/a.wav", "elsewhere/b.wav", "elsewhere/deep/c.wav")
    (tmp_path / "corpus" / "a").symlink_to(tmp_path / "corpus" / "z")
    for name in ("m", "n"):
        (tmp_path / "corpus" / name).symlink_to(tmp_path / "elsewhere")
    expected = ["m/b.wav", "m/deep/c.wav", "z/a.wav"]
    assert storage.list_files(f"{tmp_path}/corpus{pattern}")[1] == expected


def test_recursive_pattern_finds_hidden_files_only_where_it_names_them(tmp_path):
    write(tmp_path, "a.wav", ".trash/b.wav")
    assert storage.list_files(f"{tmp_path}/**/*.wav")[1] == ["a.wav"]
    assert storage.list_files(f"{tmp_path}/**/.trash/*.wav")[1] == [".trash/b.wav"]


def test_size_is_that_of_the_file_and_none_if_there_is_none(tmp_path):
    for url in (str(tmp_path / "x"), f"memory:/{tmp_path}/x"):
        assert storage.size(url) is None
        storage.publish_bytes(url, b"12345")
        assert storage.size(url) == 5


def test_missing_folder_and_file_as_folder_are_named(tmp_path):
    write(tmp_path, "x")
    with pytest.raises(StorageError, match=f"^{tmp_path}/none: no such folder"):
        storage.list_files(str(tmp_path / "none"))
    storage.publish_bytes(f"memory:/{tmp_path}/x", b"")
    for url in (str(tmp_path / "x"), f"memory:/{tmp_path}/x"):
        with pytest.raises(StorageError, match=f"^{url}: a file, not a folder"):
            storage.list_files(url)


@pytest.mark.parametrize("pattern", ["", "/*.wav"])
def test_listing_nothing_is_an_error_on_every_store(tmp_path, pattern):
    for url in (f"{tmp_path}{pattern}", f"memory:/{tmp_path}{pattern}"):
        with pytest.raises(StorageError):
            storage.list_files(url)


def test_remote_file_is_read_in_every_way_a_local_one_is(tmp_path):
    for url in (str(tmp_path / "x"), f"memory:/{tmp_path}/x"):
        storage.publish_bytes(url, b"one\ntwo\nthree")
        with storage.open_read(url) as file:
            assert (file.readline(), file.tell(), file.read(3), file.read(), file.read()) == (
                b"one\n",
                4,
                b"two",
                b"\nthree",
                b"",
            )
            assert file.seek(-5, 2) == 8
            buffer = bytearray(9)
            assert file.readinto(buffer) == 5 and buffer == b"three\0\0\0\0"


def test_other_filesystem_publishes_create_only(tmp_path):
    url = f"memory:/{tmp_path}/x"
    assert storage.publish_bytes(url, b"first", create_only=True) is True
    assert storage.publish_bytes(url, b"second", create_only=True) is False
    assert storage.read_bytes(url) == b"first"
    assert storage.publish_bytes(url, b"third") is True
    assert storage.read_bytes(url) == b"third"
    with pytest.raises(StorageError, match="none: no such file"):
        storage.read_bytes(f"memory:/{tmp_path}/none")


class Stopping(MemoryFileSystem):
    """A store during whose call a signal comes: its handler raises from wherever it is."""

    protocol = "stopping"

    def cat_file(self, path, start=None, end=None, **options):
        raise Stopped("stopped by SIGTERM")


def test_signal_during_a_call_of_a_store_stops_and_is_no_fault_of_the_store():
    fsspec.register_implementation("stopping", Stopping, clobber=True)
    with pytest.raises(Stopped):
        storage.read_bytes("stopping://x")
