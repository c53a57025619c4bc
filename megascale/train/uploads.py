"""Copies of a run's checkpoints at another URL, made beside training; and the way back, onto a machine that has none.

At the URL lies what looks like a run folder: `checkpoints/step-…`, where a manifest is written last, as on the disk.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megascale import storage
from megascale.errors import CredentialsError, MegascaleError, Stopped, StorageError, StoreUnavailable
from megascale.log import duration, say
from megascale.stopping import StopSignal, stop_asked
from megascale.train import checkpoint
from megascale.train.checkpoint import CheckpointConfig
from megascale.train.engine import any_rank, barrier
from megascale.train.manifest import CHECKPOINTS, MANIFEST, list_checkpoints, losses_of, prune, read_manifest, retained

_GRACE_SECONDS = 60.0  # a preempted machine has little more, and the next start uploads what is missing
_POLL_SECONDS = 0.2


def upload(folder: Path, url: str) -> None:
    """Copy a committed checkpoint to a URL, the manifest last. Raises StorageError."""
    names = read_manifest(str(folder)).files
    storage.delete(storage.join(url, MANIFEST))  # one of another run's must not stand over these files
    for name in names:
        storage.upload(folder / name, storage.join(url, name))
    there, here = storage.sizes(url), storage.sizes(str(folder))
    for name in names:
        if there.get(name) != here.get(name):
            raise StorageError(f"{storage.join(url, name)}: {there.get(name)} bytes arrived of {here.get(name)}")
    storage.upload(folder / MANIFEST, storage.join(url, MANIFEST))


def sync(checkpoints: Path, url: str, keep_last: int, keep_every: int | None) -> None:
    """Upload what is kept here, is to be kept at the URL and is not there, the newest first; then prune there.

    What is kept is chosen among all that is here or there, so that nothing is uploaded in order to be pruned. Keys that may
    write and not delete are enough: what is no longer kept then stays at the URL.

    Raises:
        StorageError: the store, or a file here cannot be read.
    """
    target = storage.join(url, CHECKPOINTS)
    here = {each.step: each for each in list_checkpoints(str(checkpoints)) if each.manifest is not None}
    there = {each.step: each for each in list_checkpoints(target) if each.manifest is not None}
    wanted = retained(losses_of([*(there | here).values()]), keep_last, keep_every)
    for step in sorted(wanted & here.keys(), reverse=True):
        if step not in there or there[step].manifest != here[step].manifest:
            started, folder = time.monotonic(), Path(here[step].url)
            upload(folder, storage.join(target, folder.name))
            say(f"{storage.join(target, folder.name)}: uploaded in {duration(time.monotonic() - started)}")
    try:
        prune(target, keep_last, keep_every)
    except (CredentialsError, StoreUnavailable):
        raise
    except StorageError as failure:
        say(f"what is no longer kept stays there: {failure}")


def fetch_newest(url: str, checkpoints: Path) -> Path | None:
    """Copy the newest committed checkpoint at a URL here, verified, if there is none as new; rank 0 alone.

    Args:
        url: a run folder.
        checkpoints: the local folder of checkpoints.

    Returns:
        Where it lies now; None if there was nothing to fetch.

    Raises:
        CheckpointError: a file there is missing or changed; names it.
        StorageError: the store, or the disk.
    """
    there = [each for each in list_checkpoints(storage.join(url, CHECKPOINTS)) if each.manifest is not None]
    here = [each for each in list_checkpoints(str(checkpoints)) if each.manifest is not None]
    if not there or (here and here[-1].step >= there[-1].step):
        return None
    folder = checkpoint.step_folder(checkpoints, there[-1].step)
    say(f"{folder}: fetching {there[-1].num_bytes / 1e6:.1f} MB from {there[-1].url}")
    checkpoint.begin(folder)
    checkpoint.fetch(there[-1].url, folder)
    return folder


class Uploads:
    """Keeps a URL like the local folder, in a thread of its own: one upload at a time, started after each commit.

    One that fails is told in one line and tried again at the next start; training goes on.
    """

    def __init__(self, checkpoints: Path, url: str, keep_last: int, keep_every: int | None) -> None:
        self._checkpoints, self._url = checkpoints, url
        self._keep_last, self._keep_every = keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether an upload is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Upload, in the background, what is missing at the URL."""
        # a daemon: what ends training by an error must not wait for a store
        self._thread = threading.Thread(target=self._run, args=(self._thread,), daemon=True)
        self._thread.start()

    def _run(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        self._failure = None
        try:
            sync(self._checkpoints, self._url, self._keep_last, self._keep_every)
        except MegascaleError as failure:
            self._failure = failure
            say(f"upload failed, and is tried again with the next checkpoint: {type(failure).__name__}: {failure}")
        except Exception as failure:  # a fault of the code; raised where this is joined
            self._failure = failure

    def join_unless_stopping(self) -> None:
        """Wait for the upload under way, but no longer once the job is asked to stop: saving comes first then."""
        started = time.monotonic()
        while self.busy and not stop_asked():
            self._join(_POLL_SECONDS)
        if (waited := time.monotonic() - started) > 10:
            say(f"the upload took longer than the steps between checkpoints: waited {duration(waited)} for it")
        self._raise_faults_of_code()

    def join_at_stop(self) -> None:
        """Wait for the upload under way as long as a stopped job may."""
        self._join(_GRACE_SECONDS)
        if self.busy:
            say(f"{self._url}: the upload is not finished; the next start goes on with it")

    def finish(self) -> None:
        """Wait for the last upload. Raises StorageError if it failed."""
        while self.busy:
            self._join(_POLL_SECONDS)  # in pieces, so that SIGTERM is heard
        self._raise_faults_of_code()
        if self._failure is not None:
            kind = StoreUnavailable if isinstance(self._failure, StoreUnavailable) else StorageError
            raise kind(
                f"{self._failure} (upload failed; all is safe in {self._checkpoints}, and the same command uploads it)"
            )

    def _join(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def _raise_faults_of_code(self) -> None:
        if self._failure is not None and not isinstance(self._failure, MegascaleError):
            raise self._failure


@contextmanager
def uploading(checkpoints: Path, config: CheckpointConfig, rank: int) -> Iterator[Uploads | None]:
    """Give the block its `Uploads`; only rank 0 has any, and only where the config names a URL.

    At the block's end the last upload is waited for; where SIGTERM ended it, for a minute at most. Every rank waits: a
    launcher stops the others some time after it sees one end.

    Raises:
        StorageError: the last upload failed.
        Stopped: SIGTERM came while it was waited for.
    """
    if config.upload_url is None:
        yield None
        return
    uploads = None
    if rank == 0:
        uploads = Uploads(checkpoints, config.upload_url, config.keep_last, config.keep_every)
    try:
        yield uploads
    except Stopped as stopped:
        if stopped.together:  # else another rank may be anywhere
            with StopSignal():  # launchers send SIGTERM more than once
                if uploads is not None:
                    uploads.join_at_stop()
                barrier()
        raise
    with StopSignal() as stop:
        while any_rank(uploads is not None and uploads.busy):
            if any_rank(stop.asked):
                raise Stopped("stopped before the last checkpoint was uploaded; run the same command to go on")
            time.sleep(_POLL_SECONDS)
    if uploads is not None:
        uploads.finish()


def upload_missing(checkpoints: Path, config: CheckpointConfig) -> None:
    """Upload what a finished run's URL still lacks; called by one rank alone. Raises StorageError."""
    if config.upload_url is not None:
        uploads = Uploads(checkpoints, config.upload_url, config.keep_last, config.keep_every)
        uploads.start()
        uploads.finish()
