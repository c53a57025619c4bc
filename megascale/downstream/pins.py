"""Which checkpoints the encoders of a table are: a run's best may become another while it trains, and no table mixes two."""

import json
from collections.abc import Container, Iterable
from dataclasses import asdict

from megascale import run_folder, storage
from megascale.errors import CheckpointError
from megascale.train.checkpoint import FoundModel, find_model

PINS = "checkpoints.json"

Pins = dict[str, FoundModel]  # by what the config calls them


def pin(urls: Iterable[str], output_url: str) -> Pins:
    """Return what each URL stood for when the table first met it; what it stands for now, if that is the first time.

    Raises:
        CheckpointError: not a checkpoint.
    """
    known = run_folder.read_result(storage.local_path(output_url), PINS) or {}
    return {url: FoundModel(**known[url]) if url in known else find_model(url) for url in dict.fromkeys(urls)}


def check_pins(pins: Pins, needed: Container[str]) -> None:
    """Look again at the checkpoints that are still needed, by their own URLs.

    Raises:
        CheckpointError: one is gone, or has other weights, since the table met it.
    """
    for met in pins.values():
        if met.url in needed:
            _check_again(met)


def write_pins(pins: Pins, output_url: str) -> None:
    """Write `checkpoints.json`; what an earlier start met stays in it."""
    known = run_folder.read_result(storage.local_path(output_url), PINS) or {}
    known |= {url: asdict(found) for url, found in pins.items()}
    storage.publish_bytes(storage.join(output_url, PINS), json.dumps(known, indent=1).encode())


def _check_again(met: FoundModel) -> None:
    try:
        now = find_model(met.url)
    except CheckpointError as failure:
        raise CheckpointError(
            f"{failure}; this table began with it, and its cells must not mix two encoders (checkpoint.keep_every keeps "
            "checkpoints of a run that goes on)"
        ) from None
    if now.sha256 != met.sha256:
        raise CheckpointError(
            f"{met.url}: not the weights that this table began with; choose another table1.output.url for these"
        )
