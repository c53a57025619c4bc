"""The checks of `megascale doctor` on what a job speaks to: stores, their clock, a codec's file, wandb."""

import contextlib
import netrc
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megascale import storage
from megascale.doctor import Finding, check_disk, probe_name
from megascale.errors import CredentialsError, MegascaleError, StorageError, StoreUnavailable

_NET_SECONDS = 5.0  # for a server's first answer
_SKEW_SECONDS = 900.0  # by which a clock may be off before S3 refuses what it signed
_UNREACHABLE = "see to the store, --endpoint-url, HTTPS_PROXY, and the firewall or NetworkPolicy"


def check_storage(url: str) -> Finding:
    """Write, list, read back and delete an object below a new name; nothing else in the store is read or changed."""
    if storage.is_local(url):
        return check_disk(str(storage.local_path(url)), 0.0, "storage")
    if url.startswith("s3://") and not _installed("s3fs"):
        return Finding("storage", "FAIL", f"{url}: s3fs is not installed", "pip install 'megascale[s3]'")
    folder = storage.join(url, probe_name())
    server, step, started = None, "reach", time.monotonic()
    try:
        server = storage.endpoint(url)
        if server is not None:
            _ask(server)
        for step in _STEPS:
            _STEPS[step](folder)
    except OSError as failure:
        return Finding("storage", "FAIL", f"{url}: {server} does not answer: {_reason(failure)}", _UNREACHABLE)
    except StorageError as failure:
        reason = str(failure).replace(f"{folder}/probe: ", "").replace(f"{folder}: ", "").removeprefix(f"{url}: ")
        found = f"{url}: cannot {step}: {reason}"
        # also where the write failed: a store may have done it and answered too late
        if step != "reach" and not _is_deleted(folder) and step != "write":
            found += f"; {folder} could not be deleted"
        return Finding("storage", "FAIL", found, _storage_fix(url, step, failure))
    return Finding("storage", "ok", f"{url}: written, listed, read back, deleted in {time.monotonic() - started:.1f} s")


def _write(folder: str) -> None:
    storage.publish_bytes(storage.join(folder, "probe"), folder.encode())


def _list(folder: str) -> None:
    if list(storage.sizes(folder)) != ["probe"]:
        raise StorageError(f"{folder}: what was written is not listed")


def _read(folder: str) -> None:
    if storage.read_bytes(storage.join(folder, "probe")) != folder.encode():
        raise StorageError(f"{folder}: other bytes came back than were written")


def _delete(folder: str) -> None:
    storage.delete_file(storage.join(folder, "probe"))
    with contextlib.suppress(StorageError):  # in a store whose folders are more than prefixes
        storage.delete(folder)


def _is_deleted(folder: str) -> bool:
    try:
        _delete(folder)
    except StorageError:
        return False
    return True


_STEPS = {"write": _write, "list": _list, "read": _read, "delete": _delete}
_ACTIONS = {"list": "s3:ListBucket", "write": "s3:PutObject", "read": "s3:GetObject", "delete": "s3:DeleteObject"}


def _storage_fix(url: str, step: str, failure: StorageError) -> str:
    if isinstance(failure, CredentialsError):
        return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of this store, or AWS_PROFILE, or a role for the machine"
    if isinstance(failure, StoreUnavailable):
        return _UNREACHABLE
    if "permission denied" in str(failure):
        return f"let this key {step} there ({_ACTIONS.get(step, 's3:*')} on {url})"
    if "no such file" in str(failure):
        return f"make the bucket (aws s3 mb s3://{urlsplit(url).netloc}), or mend the URL"
    return "mend the URL or --endpoint-url"


def check_clock(urls: Sequence[str]) -> Finding:
    """Hold this machine's clock against the first of these URLs' stores that tells the time."""
    for url in urls:
        try:
            server = storage.endpoint(url)
            theirs = parsedate_to_datetime(_ask(server) or "") if server is not None else None
        except (OSError, StorageError, ValueError):  # the line about this store tells of it
            continue
        if theirs is not None:
            off = (datetime.now(UTC) - theirs).total_seconds()
            found = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} {server}"
            if abs(off) < 60:
                return Finding("clock", "ok", found)
            found += f"; S3 refuses what is signed {_SKEW_SECONDS / 60:.0f} minutes off"
            fix = "timedatectl set-ntp true (a container's clock is its host's)"
            return Finding("clock", "FAIL" if abs(off) > _SKEW_SECONDS else "warn", found, fix)
    return Finding("clock", "skip", "no store that tells the time", "--storage s3://BUCKET/PREFIX")


def check_codec(url: str | None) -> Finding:
    """Load a codec as tokenization does, which checks its hash."""
    from megascale.tokenize.codec import CALIBRATE, PUBLISHED_FILE, load_codec

    if url is None or url == CALIBRATE:
        found = "codec.weights=calibrate computes weights from the corpus, and needs no file"
        return Finding("codec", "skip", found, f"--codec {PUBLISHED_FILE} checks EnCodec's own")
    try:
        codec = load_codec(url)
    except MegascaleError as failure:
        fix = f"curl -O https://dl.fbaipublicfiles.com/encodec/v0/{PUBLISHED_FILE}"
        return Finding("codec", "FAIL", str(failure), "copy it again" if url.endswith(".safetensors") else fix)
    return Finding("codec", "ok", f"{url}: {codec.name}, {codec.num_codebooks} codebooks, {codec.fingerprint}")


def check_wandb() -> Finding:
    """Look whether wandb has a key and is reached; training goes on without it, so nothing here fails."""
    if not _installed("wandb"):
        return Finding("wandb", "skip", "not installed; log.wandb_project needs it", "pip install 'megascale[wandb]'")
    version, mode = metadata.version("wandb"), os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "disabled", "dryrun"):
        return Finding("wandb", "ok", f"{version}, WANDB_MODE={mode}")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        _ask(host.geturl())
    except (OSError, ValueError) as failure:
        found = f"{version}, {host.hostname} does not answer: {_reason(failure)}"
        return Finding("wandb", "warn", found, "WANDB_MODE=offline (`wandb sync` later), or HTTPS_PROXY")
    if not _has_wandb_key(host.hostname or ""):
        return Finding("wandb", "warn", f"{version}, no API key for {host.hostname}", "wandb login, or WANDB_API_KEY")
    return Finding("wandb", "ok", f"{version}, {host.hostname} answers, there is an API key")


def _has_wandb_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with contextlib.suppress(OSError, RuntimeError, netrc.NetrcParseError):  # the second: a user without a home
        file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return netrc.netrc(str(file)).authenticators(host) is not None
    return False


def _installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name, such as wandb's runs, has no origin


class _Stay(urllib.request.HTTPRedirectHandler):
    """Takes a redirection for an answer: AWS sends HEAD of S3 to a page on another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _ask(url: str) -> str | None:
    """Return the `Date` of a web server's answer, whatever the answer is. Raises OSError if there is none."""
    context = ssl.create_default_context()
    context.check_hostname = False  # the store's own client checks the certificate; here nothing is sent or believed
    context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(_Stay, urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(urllib.request.Request(url, method="HEAD"), timeout=_NET_SECONDS) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as answer:
        date = answer.headers["Date"]
    except HTTPException as failure:
        raise ConnectionError(f"no HTTP: {failure!r}") from None
    return None if date is None else str(date)


def _reason(failure: Exception) -> str:
    """Return what is behind urllib's `<urlopen error …>`."""
    return str(getattr(failure, "reason", failure))
