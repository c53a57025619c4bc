"""The Hugging Face hub: a repo's files, and what its client raises as one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megascale.errors import StorageError


def is_repo_id(name: str) -> bool:
    """Return whether a name can be that of a repo: `owner/name`, or `name` alone."""
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII) is not None


def find_file(repo: str, name: str, **options: Any) -> Path | None:
    """Return a repo's file, fetched unless it lies in the client's cache; None if the repo doesn't hold it (offline: the
    cache). The caller has looked for a folder of that name before.

    Args:
        repo: its id.
        name: the file's path in it.
        options: as of `huggingface_hub.hf_hub_download`: revision, token, cache_dir, …

    Raises:
        StorageError: no such repo, no access, or the hub does not answer; names the file.
    """
    import huggingface_hub  # with an HTTP client, which every job would load
    from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

    with told(f"{repo}: no such folder here; {name} of that repo"):
        try:
            return Path(huggingface_hub.hf_hub_download(repo, name, **options))
        except EntryNotFoundError as failure:
            cause = failure.__cause__
            if isinstance(failure, FileNotFoundError) and cause and not isinstance(cause, OfflineModeIsEnabled):
                raise ConnectionError(f"no answer: {_in_one_line(cause)}") from None
            return None


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what the hub's client raises in the block into a StorageError that names `what`."""
    from huggingface_hub.errors import HfHubHTTPError

    # the base of what the client's HTTP library raises where nothing answers: httpx, or what came after it
    no_answer: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        yield
    except (no_answer, OSError, ValueError) as failure:
        raise StorageError(f"{what}: the Hugging Face hub: {_in_one_line(failure)}") from None


def _in_one_line(failure: BaseException) -> str:
    return " ".join(str(failure).split()) or type(failure).__name__
