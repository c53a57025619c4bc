"""`megascale doctor` and S3: what keys may not do is told by name, and a bucket is left as it was."""

import sys
from collections.abc import Iterator

import fsspec
import pytest
from conftest import run
from fault_proxy import FaultProxy
from s3_servers import Server, keys_in_environment, keys_that_may, moto, use_keys

from megascale.doctor_services import check_storage
from megascale.storage import StorageConfig, configure


def doctor(*arguments: str) -> list[str]:
    """Return the command line, without the ranks, which have tests of their own."""
    return [sys.executable, "-m", "megascale", "doctor", "--ranks", "0", "--disk-gb", "0", *arguments]


def lines_of(printed: str, name: str) -> list[str]:
    return [line for line in printed.splitlines() if line.split()[1] == name]


def test_bucket_is_written_to_and_left_as_it_was(server):
    fs = server.filesystem()
    fs.pipe_file("bucket/doctor/kept", b"kept")
    before = fs.find("bucket")
    urls = ["--storage", "s3://bucket", "--storage", "s3://bucket/doctor/", "--storage", "s3://bucket/new/prefix"]
    printed = run(doctor(*urls, "--endpoint-url", server.endpoint))
    assert [line[:5] for line in lines_of(printed, "storage")] == ["ok   "] * 3
    assert [line[:5] for line in lines_of(printed, "clock")] == ["ok   "]
    assert fs.find("bucket") == before == ["bucket/doctor/kept"]


def test_bucket_that_is_not_there_fails_by_name(server):
    printed = run(doctor("--storage", "s3://nobucket/x", "--endpoint-url", server.endpoint), exit_code=2)
    (line,) = lines_of(printed, "storage")
    assert line.startswith("FAIL  storage    s3://nobucket/x: cannot write: no such file -> make the bucket (aws s3 mb")


@pytest.fixture(scope="module")
def strict() -> Iterator[Server]:
    """moto, which looks at keys and what they may do when it is told to."""
    with keys_in_environment(), moto() as started:
        yield started


ALL = ("s3:PutObject", "s3:ListBucket", "s3:GetObject", "s3:DeleteObject")


@pytest.mark.parametrize("missing", range(4))
def test_what_a_key_may_not_do_is_named(strict, monkeypatch, missing):
    with keys_that_may(strict, [action for action in ALL if action != ALL[missing]], monkeypatch):
        found = check_storage("s3://bucket/denied")
    step = ("write", "list", "read", "delete")[missing]
    assert found.state == "FAIL" and f"s3://bucket/denied: cannot {step}: permission denied" in found.found
    assert ALL[missing] in found.fix
    fs = strict.filesystem()
    left = fs.find("bucket/denied")
    assert len(left) == ("could not be deleted" in found.found) == (step == "delete")
    if left:
        fs.rm("bucket/denied", recursive=True)


def test_key_that_may_do_all_of_it_is_ok(strict, monkeypatch):
    with keys_that_may(strict, ALL, monkeypatch):
        assert check_storage("s3://bucket/allowed").state == "ok"
    assert strict.filesystem().find("bucket/allowed") == []


@pytest.mark.parametrize(
    ("access_key", "secret"), [("testkey", "wrong"), ("wrong", "testsecret")], ids=["wrong secret", "unknown key"]
)
def test_keys_that_the_store_does_not_know_are_told_and_never_printed(server, monkeypatch, access_key, secret):
    if server.name == "moto":
        pytest.skip("takes any keys; with its check on, see above")
    use_keys(server, monkeypatch, access_key, secret)
    found = check_storage("s3://bucket/x")
    assert found.state == "FAIL" and "does not accept the credentials" in found.found
    assert "AWS_ACCESS_KEY_ID" in found.fix and "testsecret" not in str(found)


def test_no_keys_at_all_are_told(server, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    configure(StorageConfig(endpoint_url=server.endpoint))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    found = check_storage("s3://bucket/x")
    assert found.state == "FAIL" and "Unable to locate credentials" in found.found and "AWS_PROFILE" in found.fix


def test_store_that_only_fails_is_asked_as_often_as_one_request_is(strict):
    """A job would ask five times as often, for minutes."""
    with FaultProxy(strict.endpoint, share=1.0, kinds=("500",)) as proxy:
        printed = run(doctor("--storage", "s3://bucket/x", "--endpoint-url", proxy.url), exit_code=2)
        asked = sum(count for request, count in proxy.asked.items() if request.startswith("PUT "))
    (line,) = lines_of(printed, "storage")
    assert line.startswith("FAIL  storage    s3://bucket/x: cannot write: from the fault proxy")
    assert "--endpoint-url" in line and asked == 3
