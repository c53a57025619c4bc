"""`megascale export`: a kept model for others."""

import argparse
from typing import Any

from megascale import hub, storage
from megascale.config import has_credentials
from megascale.errors import ConfigError
from megascale.log import say

_MODEL = "a pretraining run (its best checkpoint), a checkpoint, a model/ folder, or a fine-tuning run; path or URL"


def add_to(commands: Any) -> None:
    """Add `export` to the commands of an argument parser."""
    export = commands.add_parser(
        "export",
        help="copy a model for use elsewhere, to a folder or to the Hugging Face hub",
        description="Write model.safetensors, config.json, a model card filled from the run, and the codec where it was "
        "calibrated and lies beside the run's tokens. from_pretrained reads the folder or the repo.",
    )
    export.add_argument("model", metavar="RUN", help=_MODEL + ", or the id of a repo on the Hugging Face hub")
    export.add_argument("folder", metavar="FOLDER", nargs="?", help="a new folder")
    export.add_argument(
        "--push-to-hub", metavar="NAME", help="repo on the hub, such as owner/model; made if it is not there"
    )
    export.add_argument("--private", action="store_true", help="make the repo a private one")
    export.set_defaults(run=_export)
    export.add_argument("--endpoint-url", help="S3 endpoint, for stores other than AWS")


def _configure(arguments: argparse.Namespace, *urls: str | None) -> None:
    if any(url is not None and has_credentials(url) for url in urls):
        raise ConfigError("URL: has credentials in it; leave them to the store's own chain")
    storage.configure(storage.StorageConfig(endpoint_url=arguments.endpoint_url))


def _export(arguments: argparse.Namespace) -> None:
    from megascale.export import load_model  # torch: only where it is needed

    folder, repo = arguments.folder, arguments.push_to_hub
    _configure(arguments, arguments.model, folder)
    if folder is None and repo is None:
        raise ConfigError("megascale export: FOLDER or --push-to-hub NAME says where to; see --help")
    if repo is not None and not hub.is_repo_id(repo):
        raise ConfigError(f"--push-to-hub {repo}: no id of a repo, such as owner/model")
    path = None if folder is None else storage.local_path(folder)
    if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{folder}: is not empty; choose another")
    model = load_model(arguments.model)
    if path is not None:
        model.save_pretrained(path)
        say(f"{folder}: {', '.join(sorted(file.name for file in path.iterdir()))}")
    if repo is not None:
        with hub.told(repo):
            say(str(model.push_to_hub(repo, private=arguments.private or None)))
