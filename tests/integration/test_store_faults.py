"""S3 on a bad day: errors, slow and silent answers, broken connections, refusals, and keys that expire on the way."""

import hashlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, run
from fault_proxy import FaultProxy
from s3_servers import KEYS, Server, keys_in_environment, moto
from support import write_tones
from test_tokenize import hashes, tokenize

from megascale import storage
from megascale.data.index import Quarantined
from megascale.errors import CredentialsError, StorageError, StoreUnavailable
from megascale.retry import ATTEMPTS
from megascale.tokenize.clips import Clip
from megascale.tokenize.codec import CALIBRATE
from megascale.tokenize.plan import TokenizeConfig
from megascale.tokenize.worker import _read_clip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with keys_in_environment(), moto() as started:
        yield started


@pytest.fixture(scope="module")
def weights(fitted_codec, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    path.write_bytes(fitted_codec.to_bytes())
    return f"codec.weights={path}"


@pytest.fixture(scope="module")
def undisturbed(server, weights, tmp_path_factory) -> dict[str, str]:
    """Put audio into the bucket; return the hashes of its shards, made on a local disk."""
    folder = tmp_path_factory.mktemp("local")
    write_tones(folder / "audio", 24)
    server.upload(folder / "audio", "audio")
    run(tokenize(folder / "audio", folder / "out", "shards.clips=4", weights))
    return hashes(folder / "out")


@pytest.fixture
def proxy(server) -> Iterator[FaultProxy]:
    with FaultProxy(server.endpoint, share=0.0) as started:
        storage.configure(storage.StorageConfig(endpoint_url=started.url))
        yield started


@pytest.mark.slow
def test_job_on_a_store_with_faults_gives_the_undisturbed_shards(server, weights, undisturbed, proxy):
    proxy.share = 0.1
    store = f"storage.endpoint_url={proxy.url}"
    line = tokenize("s3://bucket/audio", "s3://bucket/faults", "shards.clips=4", weights, store)
    printed = run(line)
    assert "24 clips" in printed and "0 quarantined" in printed
    fs = server.filesystem()
    made = {name: hashlib.sha256(fs.cat_file(f"bucket/faults/{name}")).hexdigest() for name in undisturbed}
    assert made == undisturbed
    faults = {kind: count for kind, count in proxy.done.items() if kind != "good"}
    assert sum(faults.values()) >= 10 and len(faults) >= 3, faults


@pytest.mark.parametrize("kind", ["500", "503", "cut"])
def test_read_and_write_outlive_a_bad_moment(proxy, kind):
    proxy.kinds, proxy.share = (kind,), 0.4
    data = os.urandom(100_000)
    storage.publish_bytes(f"s3://bucket/moment/{kind}", data)
    assert storage.read_bytes(f"s3://bucket/moment/{kind}") == data
    with storage.open_read(f"s3://bucket/moment/{kind}") as file:
        file.seek(70_000)
        assert file.read() == data[70_000:]
    assert storage.list_files("s3://bucket/moment/*")[1].count(kind) == 1
    assert proxy.done[kind] >= 3


@pytest.mark.slow
def test_store_that_fails_for_good_ends_with_its_url(proxy):
    proxy.kinds, proxy.share = ("500",), 1.0
    with pytest.raises(StorageError, match=r"^s3://bucket/x: Internal Server Error"):
        storage.read_bytes("s3://bucket/x")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["", "/*/*.wav"])
def test_listing_that_fails_is_an_error_and_never_a_shorter_list(proxy, undisturbed, pattern):
    assert len(storage.list_files(f"s3://bucket/audio{pattern}")[1]) == 24
    proxy.kinds, proxy.share = ("500",), 1.0
    with pytest.raises(StorageError, match=r"^s3://bucket/audio"):
        storage.list_files(f"s3://bucket/audio{pattern}")


def test_what_is_missing_is_asked_for_once(proxy):
    with pytest.raises(StorageError, match=r"^s3://bucket/none: no such file$"):
        storage.read_bytes("s3://bucket/none")
    assert proxy.done["good"] <= 3  # HEAD, GET, and whether it is a folder


# ---------------------------------------------------------------------------------------------------------- credentials

FRESH_KEYS = """
import json, pathlib, time
count = pathlib.Path({count!r})
number = len(count.read_bytes()) if count.exists() else 0
with count.open("ab") as file:
    file.write(b".")
ends = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + {announced}))
print(json.dumps(dict(Version=1, AccessKeyId=f"AKIA{{time.time():.3f}}", SecretAccessKey="hush-secret",
                      SessionToken="hush-token", **({{"Expiration": ends}} if {announced} else {{}}))))
"""


def use_process(patch: pytest.MonkeyPatch, folder: Path, announced_seconds: int) -> Path:
    """Let this process and its jobs have keys from a program, which names them after the second they were made in."""
    script, count = folder / "keys.py", folder / "asked"
    script.write_text(FRESH_KEYS.format(count=str(count), announced=announced_seconds))
    (folder / "config").write_text(f"[default]\nregion = us-east-1\ncredential_process = {sys.executable} {script}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.delenv(name)
        patch.delitem(ENVIRONMENT, name)
    settings = {"AWS_CONFIG_FILE": folder / "config", "AWS_SHARED_CREDENTIALS_FILE": folder / "none"}
    for name, value in settings.items():
        patch.setenv(name, str(value))
        patch.setitem(ENVIRONMENT, name, str(value))
    return count


def older_than(seconds: float):
    return lambda access_key: time.time() - float(access_key.removeprefix("AKIA") or 0) > seconds


@pytest.mark.parametrize(
    "announced_seconds",
    [pytest.param(3, marks=pytest.mark.slow), 0],
    ids=["they say when they end", "they do not say"],
)
def test_keys_that_expire_on_the_way_are_renewed_and_never_written(
    server, weights, undisturbed, proxy, tmp_path, monkeypatch, announced_seconds
):
    """Keys hold for three seconds, the job for much longer; only some providers say when their keys end."""
    count = use_process(monkeypatch, tmp_path, announced_seconds)
    proxy.refuses = older_than(3.0)
    out = f"expiring-{announced_seconds}"
    store = f"storage.endpoint_url={proxy.url}"
    printed = run(tokenize("s3://bucket/audio", f"s3://bucket/{out}", "shards.clips=4", weights, store))
    assert "24 clips" in printed and "0 quarantined" in printed
    assert len(count.read_bytes()) > 3
    assert announced_seconds or proxy.done["expired"] > 0
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    fs = server.filesystem()
    outputs = {name: fs.cat_file(name) for name in fs.find(f"bucket/{out}")} | {"printed": printed.encode()}
    assert {name.rpartition("/")[2] for name in outputs} >= {"manifest.json", "plan.json", "tokenize_report.json"}
    for secret in (b"AKIA", b"hush-secret", b"hush-token"):
        assert [name for name, text in outputs.items() if secret in text] == []


def test_store_that_is_gone_while_headers_are_read_ends_the_job_and_leaves_nothing_out(server, weights, tmp_path):
    """What cannot be reached is not broken: a plan without it would leave it out for good."""
    (tmp_path / "list.csv").write_text("url\ns3://bucket/audio/low/low-000.wav\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    line = tokenize(
        tmp_path / "list.csv", tmp_path / "out", "source.kind=list", weights, f"storage.endpoint_url={nobody}"
    )
    printed = run(line, exit_code=2)
    assert "StoreUnavailable: s3://bucket/audio/low/low-000.wav: " in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answers", [False, True], ids=["nothing at all", "every other request"])
def test_clip_is_left_out_only_if_its_store_answers(proxy, undisturbed, tmp_path, answers):
    sections = {"source": {"kind": "files", "url": "s3://bucket/audio"}, "workers": {"attempts": 1}}
    sections |= {"codec": {"weights": CALIBRATE, "bitrate_kbps": 1.5}}
    config = TokenizeConfig.model_validate(sections | {"output": {"url": str(tmp_path)}})
    url = "s3://bucket/audio/low/low-000.wav"
    clip = Clip("key", url, "low/low-000.wav", "key", 0.0, None, {}, None)
    proxy.spoils = lambda request: not answers or request.endswith("/low-000.wav")

    def read() -> Quarantined:
        ATTEMPTS.set(1)
        return _read_clip(clip, config, "encodec_24khz")[0]

    if answers:
        found = copy_context().run(read)
        assert isinstance(found, Quarantined) and found.reason.startswith(url) and found.attempts == 1
    else:
        with pytest.raises(StoreUnavailable, match=r"^s3://bucket/audio/low/.nothing: "):
            copy_context().run(read)


def test_expired_keys_that_nothing_renews_end_with_2(proxy, weights, undisturbed, tmp_path):
    """Clips of a local output must not be quarantined for what is no fault of theirs."""
    proxy.refuses = lambda access_key: True
    line = tokenize("s3://bucket/audio", tmp_path / "out", weights, f"storage.endpoint_url={proxy.url}")
    printed = run(line, exit_code=2)
    assert printed.startswith("CredentialsError: s3://bucket/audio: the store does not accept the credentials: Expired")
    assert not (tmp_path / "out").exists()
    assert not any(secret in printed for secret in KEYS.values() if secret != "us-east-1")


@pytest.mark.slow
def test_keys_that_end_while_clips_are_read_stop_the_job_and_quarantine_nothing(proxy, weights, undisturbed, tmp_path):
    refused = proxy.refuses
    proxy.refuses = lambda access_key: proxy.done["good"] > 60
    line = tokenize(
        "s3://bucket/audio", tmp_path / "out", "shards.clips=4", weights, f"storage.endpoint_url={proxy.url}",
    )  # fmt: skip
    printed = run(line, exit_code=2)
    assert "the store does not accept the credentials: ExpiredToken; renew them" in printed
    proxy.refuses = refused
    assert "24 clips" in run(line)
    assert (tmp_path / "out" / "quarantine.jsonl").read_text() == ""
    assert hashes(tmp_path / "out") == undisturbed


def test_no_keys_at_all_is_told(proxy, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage.configure(storage.StorageConfig(endpoint_url=proxy.url.replace("127.0.0.1", "localhost")))
    with pytest.raises(CredentialsError, match=r"^s3://bucket/x: Unable to locate credentials$"):
        storage.read_bytes("s3://bucket/x")
