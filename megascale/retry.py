"""Calls to a remote store: which faults may pass, how often a call is tried again, and when credentials are asked anew.

Two layers try again, so their numbers multiply: botocore each request (5xx, throttling, time-outs, broken connections),
and this file each whole call (bodies cut short, and outages longer than a request's patience). s3fs's own attempts, a
layer between them that knows fewer faults, are switched off. A request that is never answered is given up after
`REQUEST["read_timeout"]` seconds, and a server that never answers at all after a few minutes.
"""

import asyncio
import errno
import random
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync

from megascale.errors import CredentialsError, MegascaleError, StorageError, StoreUnavailable

T = TypeVar("T")

# botocore's settings for one request; connecting is part of none of them, so it has its own limit
REQUEST = {"connect_timeout": 10, "read_timeout": 15, "retries": {"mode": "standard", "total_max_attempts": 3}}
ATTEMPTS = ContextVar("attempts", default=5)  # of a whole call; who waits for an answer may set fewer
_PAUSE_SECONDS = 1.0  # before the second attempt, then twice as long each time
_MAY_PASS = {errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT}
_MAY_PASS |= {getattr(errno, "EREMOTEIO", errno.EIO)}  # as s3fs translates S3's InternalError
_BAD_KEYS = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}
_BAD_KEYS |= {"InvalidAccessKeyId", "SignatureDoesNotMatch"}
_NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "SSOError", "ProfileNotFound", "ConfigParseError")


def call_store(url: str, fs: fsspec.AbstractFileSystem, path: str, call: Callable[[], T]) -> T:
    """Call, and call again with growing pauses while the fault may pass.

    Args:
        url: named in what is raised.
        fs: the filesystem that `call` uses.
        path: the URL's path in it.
        call: what to do; done again, it must do the same.

    Raises:
        CredentialsError: the store does not take the credentials, or there are none, and the chain gives no others.
        StoreUnavailable: the fault did not pass.
        StorageError: missing, or refused.
        FileExistsError: as `call` raised it.
    """
    if "s3" in fs.protocol:
        fs.retries = 1
    attempts = ATTEMPTS.get()
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except (FileExistsError, MegascaleError):  # the second: Stopped, which a signal's handler raises anywhere
            raise
        except FileNotFoundError:
            raise StorageError(f"{url}: no such file") from None
        except Exception as raised:  # a store's library raises its own types: botocore's are not even OSErrors
            failure = _with_reason(fs, path, raised)
            last = attempt == attempts
            if _code(failure) in _BAD_KEYS:
                if last or not _renew_credentials(fs):
                    raise CredentialsError(
                        f"{url}: the store does not accept the credentials: {_code(failure)}; "
                        "renew them, and run the same command again"
                    ) from None
            elif _is_botocores(failure, *_NO_KEYS) or (last and _is_botocores(failure, "CredentialRetrievalError")):
                raise CredentialsError(f"{url}: {failure}") from None
            elif last or not _may_pass(failure):
                refused = "permission denied: " if isinstance(failure, PermissionError) else ""
                kind = StoreUnavailable if _may_pass(failure) else StorageError
                raise kind(f"{url}: {refused}{getattr(failure, 'strerror', None) or failure}") from None
        # jitter, so that many workers do not come back at the same moment
        time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
    raise AssertionError("the loop returns or raises")


def _with_reason(fs: fsspec.AbstractFileSystem, path: str, failure: Exception) -> Exception:
    """Ask with GET why HEAD was refused: the answer to HEAD has no body, so only its status is known."""
    if _code(failure) in ("400", "403"):
        try:
            fs.cat_file(path, start=0, end=1)
        except FileNotFoundError:
            pass
        except Exception as told:
            return told
    return failure


def _code(failure: Exception) -> str:
    """Return S3's name of a fault, such as SlowDown; empty where there is none."""
    response = getattr(failure, "response", None) or getattr(failure.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _may_pass(failure: Exception) -> bool:
    if isinstance(failure, (TimeoutError, ConnectionError)) or getattr(failure, "errno", None) in _MAY_PASS:
        return True
    s3fs = sys.modules.get("s3fs.core")
    names = ("HTTPClientError", "ConnectionError", "CredentialRetrievalError")
    return s3fs is not None and (isinstance(failure, s3fs.S3_RETRYABLE_ERRORS) or _is_botocores(failure, *names))


def _is_botocores(failure: Exception, *names: str) -> bool:
    botocore = sys.modules.get("botocore.exceptions")  # loaded only where a URL needed it
    return botocore is not None and isinstance(failure, tuple(getattr(botocore, name) for name in names))


def _renew_credentials(fs: Any) -> bool:
    """Ask the chain of credentials again in a new session; return whether what it gives may be other than before.

    It may where a credentials file was written anew, or a provider (an instance's role, `credential_process`) gives
    keys with an end.
    """
    before = _credentials(fs)
    fs.connect(refresh=True)
    after = _credentials(fs)
    if before is None or after is None or hasattr(after, "refresh_needed"):
        return after is not None
    return bool((before.access_key, before.token) != (after.access_key, after.token))


def _credentials(fs: Any) -> Any:
    async def get() -> Any:
        found = fs.session.get_credentials()
        return await found if asyncio.iscoroutine(found) else found

    return sync(fs.loop, get)
