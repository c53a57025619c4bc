"""A run's folder: the resolved config it was started with, and what it ended with."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megascale import storage
from megascale.config import Section, dump_config
from megascale.errors import ConfigError, DataError, FolderInUse, StorageError

CONFIG = "config.yaml"
RESULT = "result.json"


def check_config(folder: Path, config: Section, job: str, may_change: tuple[str, ...]) -> None:
    """Refuse to go on with a run that was started with another config.

    Args:
        folder: the run's folder; nothing is checked if no run was started there.
        config: the resolved config of now.
        job: the job's name, for messages.
        may_change: sections (`log.`, with the dot) or dotted keys that do not change what is computed.

    Raises:
        ConfigError: names the first key that differs.
        DataError: the folder's config.yaml is broken.
    """
    check_config_at(str(folder), config, job, may_change, "output.url")


def check_config_at(url: str, config: Section, job: str, may_change: tuple[str, ...], key_of_url: str) -> None:
    """`check_config` for a run at any URL; `key_of_url` is the config's key that chose it."""
    change = next(_changes(url, config, may_change), None)
    if change is not None:
        key, before, now = change
        raise ConfigError(
            f"{job}.{key}={now}: the run in {url} was started with {before}; "
            f"choose another {key_of_url}, or delete that folder"
        )


def is_config_of(folder: Path, config: Section, may_change: tuple[str, ...]) -> bool:
    """Return whether a run was started in the folder with this config, but for `may_change`, as in `check_config`."""
    return read_config(folder) is not None and next(_changes(str(folder), config, may_change), None) is None


def _changes(url: str, config: Section, may_change: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key that differs, what it was and what it is; nothing where no run was started."""
    stored = read_config_at(url)
    if stored is None:
        return
    before, now = _flatten(stored), _flatten(config.model_dump(mode="json"))
    sections = tuple(name for name in may_change if name.endswith("."))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in may_change and not key.startswith(sections):
            yield key, before.get(key), now.get(key)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the config that a run was started with, or None. Raises DataError if the file is broken."""
    return read_config_at(str(folder))


def read_config_at(url: str) -> dict[str, Any] | None:
    """`read_config` for a run at any URL."""
    place = storage.join(url, CONFIG)
    if not storage.exists(place):
        return None
    try:
        tree = yaml.safe_load(storage.read_text(place))
    except yaml.YAMLError:
        tree = None
    if not isinstance(tree, dict):
        raise DataError(f"{place}: broken; delete that folder, or choose another output.url")
    return tree


def write_config(folder: Path, config: Section) -> None:
    """Write the resolved config as the run's `config.yaml`."""
    write_config_at(str(folder), config)


def write_config_at(url: str, config: Section) -> None:
    """`write_config` for a run at any URL."""
    storage.publish_bytes(storage.join(url, CONFIG), dump_config(config).encode())


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json`; its existence says that the run is finished."""
    storage.publish_bytes(str(folder / RESULT), json.dumps(result, indent=1).encode())


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process, until the block or the process ends.

    Raises:
        FolderInUse: another process holds it.
        StorageError: the folder cannot be written to, or its disk has no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / ".lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(f"{folder}: another process is at work in this folder; wait for it, or stop it") from None
        except OSError as failure:
            raise StorageError(f"{folder}/.lock: cannot be written, or locked: {failure.strerror}") from None
        yield


def read_result(folder: Path, name: str = RESULT) -> dict[str, Any] | None:
    """Return a finished run's result, or None. Raises DataError if the file is broken."""
    path = folder / name
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_bytes())
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise DataError(f"{path}: broken; delete it to run again")
    return result


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
