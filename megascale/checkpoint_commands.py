"""`megascale checkpoints list|verify|prune URL`."""

import argparse
from typing import Any

from megascale import storage
from megascale.config import has_credentials
from megascale.errors import CheckpointError, ConfigError
from megascale.log import Progress
from megascale.train import manifest as manifests
from megascale.train.manifest import MANIFEST, Listed

_URL = "a run folder or its checkpoints folder: a local path, s3://…, or any URL that fsspec knows"


def add_to(commands: Any) -> None:
    """Add `checkpoints` to the commands of an argument parser."""
    summary = "list, verify and prune the checkpoints of a run, wherever they lie"
    parser = commands.add_parser("checkpoints", help=summary, description=summary.capitalize() + ".")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    listing = actions.add_parser(
        "list",
        help="one line for each",
        description="Print one line for each checkpoint, the best by validation loss and the newest marked. One without a "
        "manifest is incomplete: a save, an upload or a deletion was cut short, and nothing loads it.",
    )
    listing.set_defaults(run=_list)

    verify = actions.add_parser(
        "verify",
        help="check the hash of every file",
        description="Check every file of every committed checkpoint, or of the one named, against the sha256 in its "
        "manifest. Names each file that is changed or missing, and ends with 2 if there is one.",
    )
    verify.set_defaults(run=_verify)

    prune = actions.add_parser(
        "prune",
        help="delete old ones",
        description="Delete checkpoints that are not kept, and incomplete ones older than the newest committed. The newest "
        "and the best by validation loss always stay, and so does one whose manifest is damaged.",
    )
    prune.add_argument("--keep-last", type=_count, default=2, metavar="K", help="newest to keep (default 2)")
    prune.add_argument("--keep-every", type=_count, metavar="N", help="keep those whose step is a multiple of N, too")
    prune.add_argument("--dry-run", action="store_true", help="print what would be deleted; delete nothing")
    prune.set_defaults(run=_prune)

    for action, also in ((listing, ""), (verify, "; or one step-… folder"), (prune, "")):
        action.add_argument("url", metavar="URL", help=_URL + also)
        action.add_argument("--endpoint-url", help="S3 endpoint, for stores other than AWS")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _open(arguments: argparse.Namespace) -> str:
    if has_credentials(arguments.url):
        raise ConfigError("URL: has credentials in it; leave them to the store's own chain")
    storage.configure(storage.StorageConfig(endpoint_url=arguments.endpoint_url))
    return str(arguments.url).rstrip("/")


def _find(url: str) -> list[Listed]:
    found = manifests.list_checkpoints(url)
    if not found:
        raise CheckpointError(f"{url}: no checkpoints here")
    return found


def _list(arguments: argparse.Namespace) -> None:
    listed = _find(_open(arguments))
    losses = manifests.losses_of(listed)
    best, newest = manifests.best_step(losses), max(losses, default=None)
    rows = [("checkpoint", "samples", "valid loss", "ranks", "size", "committed (UTC)", "state")]
    for each in listed:
        marks = [word for word, step in (("best", best), ("newest", newest)) if each.manifest and each.step == step]
        state, manifest = ", ".join([each.state, *marks]), each.manifest
        name, size = each.url.rpartition("/")[2], _size(each.num_bytes)
        if manifest is None:
            rows.append((name, "-", "-", "-", size, "-", state))
            continue
        loss = "-" if manifest.valid_loss is None else f"{manifest.valid_loss:.4f}"
        when = "-" if manifest.committed_at is None else f"{manifest.committed_at:%Y-%m-%d %H:%M}"
        rows.append((name, f"{manifest.consumed_samples:,}", loss, str(manifest.world_size), size, when, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        # numbers to the right
        cells = [
            f"{cell:>{w}}" if 1 <= i <= 4 else f"{cell:<{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def _verify(arguments: argparse.Namespace) -> None:
    url = _open(arguments)
    if storage.exists(storage.join(url, MANIFEST)) or url.rpartition("/")[2].startswith("step-"):
        num_faults = _verify_one(url, tuple(storage.sizes(url)))
    else:
        num_faults = 0
        for each in _find(url):
            if each.state == manifests.INCOMPLETE:
                print(f"{each.url}: {each.state}, nothing loads it")
            else:
                num_faults += _verify_one(each.url, each.names)
    if num_faults:
        raise CheckpointError(f"{url}: {num_faults} {'file is' if num_faults == 1 else 'files are'} damaged or missing")


def _verify_one(url: str, names: tuple[str, ...]) -> int:
    """Print what is wrong with a checkpoint; return the number of its faults."""
    try:
        files = manifests.read_manifest(url).files
    except CheckpointError as failure:
        print(failure)
        return 1
    num_faults = 0
    progress = Progress(f"verifying {url.rpartition('/')[2]}", len(files), unit="files")
    for done, (place, fault) in enumerate(manifests.check_files(url, files), start=1):
        progress.update(done)
        if fault is not None:
            num_faults += 1
            print(f"{place}: {fault}")
    for name in sorted(set(names) - {MANIFEST, *files}):
        loadable = name.endswith(".pt")
        num_faults += loadable
        print(
            f"{storage.join(url, name)}: {manifests.UNNAMED if loadable else 'not named in the manifest; nothing loads it'}"
        )
    progress.close("" if num_faults else "whole")
    return num_faults


def _prune(arguments: argparse.Namespace) -> None:
    listed = _find(_open(arguments))
    doomed = manifests.to_prune(listed, arguments.keep_last, arguments.keep_every)
    for each in doomed:
        print(
            f"{'would delete' if arguments.dry_run else 'deleting'} {each.url}  {_size(each.num_bytes)}, {each.state}"
        )
        if not arguments.dry_run:
            manifests.delete_checkpoint(each.url)
    freed = _size(sum(each.num_bytes for each in doomed))
    print(f"{len(doomed)} of {len(listed)} checkpoints {'would go' if arguments.dry_run else 'deleted'}, {freed}")
