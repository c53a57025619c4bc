"""The same job on S3, against two servers over HTTP: moto's, and rclone's, which ignores create-only."""

import hashlib
from pathlib import Path

import pytest
from conftest import run
from s3_servers import KEYS
from support import write_tones
from test_tokenize import hashes, tokenize

from megascale.storage import publish_bytes, read_start


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, Path]:
    """The audio, and an undisturbed run on a local disk."""
    folder = tmp_path_factory.mktemp("local")
    paths = write_tones(folder / "audio", 12)
    (folder / "audio" / "cut.wav").write_bytes(paths[0].read_bytes()[:20_000])
    run(tokenize(folder / "audio", folder / "out", "shards.clips=8"))
    return folder / "audio", folder / "out"


@pytest.mark.parametrize("server", ["moto", pytest.param("rclone", marks=pytest.mark.slow)], indirect=True)
def test_a_bucket_gives_the_shards_of_a_local_disk(server, local):
    audio, reference = local
    fs = server.filesystem()
    server.upload(audio, "audio")
    weights = f"codec.weights={reference / 'codec.safetensors'}"
    store = f"storage.endpoint_url={server.endpoint}"
    line = tokenize("s3://bucket/audio", "s3://bucket/out", "shards.clips=8", weights, store)
    printed = run(line)
    assert "12 clips" in printed and "1 quarantined" in printed
    names = [name for name in fs.find("bucket/out") if "/tokens-" in name]
    assert {n.rpartition("/")[2]: hashlib.sha256(fs.cat_file(n)).hexdigest() for n in names} == {
        name: digest if name.endswith(".tar") else hashlib.sha256(in_bucket(reference / name, audio)).hexdigest()
        for name, digest in hashes(reference).items()
    }
    for secret in (KEYS["AWS_SECRET_ACCESS_KEY"], KEYS["AWS_ACCESS_KEY_ID"]):
        assert secret not in printed
        assert not any(secret.encode() in fs.cat_file(name) for name in fs.find("bucket/out"))
    assert b"</html>" in fs.cat_file("bucket/out/report.html")
    assert "already done" in run(line)


def in_bucket(index: Path, audio: Path) -> bytes:
    """An index names the URLs of quarantined clips, and nothing else of where the corpus lies."""
    return index.read_bytes().replace(str(audio).encode(), b"s3://bucket/audio")


def test_create_only_holds_where_the_store_honours_it(server):
    publish_bytes("s3://bucket/once", b"first", create_only=True)
    second = publish_bytes("s3://bucket/once", b"second", create_only=True)
    assert second == (server.name == "rclone")  # so correctness never rests on it
    assert server.filesystem().cat_file("bucket/once") == (b"second" if second else b"first")


@pytest.mark.parametrize("size", [0, 5, 3_000_000])
def test_first_bytes_are_read_alone(server, size):
    data = bytes(range(256)) * 12_000
    publish_bytes("s3://bucket/first", data[:size])
    assert read_start("s3://bucket/first", 10) == data[: min(size, 10)]


@pytest.mark.parametrize("url", ["s3://bucket/nothing", "s3://no-such-bucket/audio"])
def test_missing_prefix_or_bucket_ends_with_2(server, tmp_path, url):
    store = f"storage.endpoint_url={server.endpoint}"
    printed = run(tokenize(url, tmp_path / "out", store), exit_code=2)
    assert url in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()
