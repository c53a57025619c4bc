"""A run's folder: the resolved config it was started with, and what it ended with."""

import json
from pathlib import Path
from typing import Any

import yaml

from megascale import storage
from megascale.config import Section, dump_config
from megascale.errors import ConfigError, DataError

CONFIG = "config.yaml"
RESULT = "result.json"


def check_config(folder: Path, config: Section, job: str, may_change: tuple[str, ...]) -> None:
    """Refuse to go on with a run that was started with another config.

    Args:
        folder: the run's folder; nothing is checked if no run was started there.
        config: the resolved config of now.
        job: the job's name, for messages.
        may_change: sections or dotted keys that do not change what is computed.

    Raises:
        ConfigError: names the first key that differs.
    """
    path = folder / CONFIG
    if not path.exists():
        return
    before = _flatten(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    now = _flatten(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(may_change):
            raise ConfigError(
                f"{job}.{key}={now.get(key)}: the run in {folder} was started with {before.get(key)}; "
                "choose another output.url, or delete that folder"
            )


def write_config(folder: Path, config: Section) -> None:
    """Write the resolved config as the run's `config.yaml`."""
    storage.publish_bytes(str(folder / CONFIG), dump_config(config).encode())


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json`; its existence says that the run is finished."""
    storage.publish_bytes(str(folder / RESULT), json.dumps(result, indent=1).encode())


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return a finished run's result, or None. Raises DataError if the file is broken."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError:
        raise DataError(f"{path}: broken; delete it to run again") from None


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
