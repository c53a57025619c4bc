"""`megascale export` and `megascale embed`: a kept model for others, and what it makes of tokens."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from megascale import hub, storage
from megascale.config import has_credentials
from megascale.errors import CheckpointError, ConfigError, DataError
from megascale.log import say

_MODEL = "a pretraining run (its best checkpoint), a checkpoint, a model/ folder, or a fine-tuning run; path or URL"


def add_to(commands: Any) -> None:
    """Add `export` and `embed` to the commands of an argument parser."""
    export = commands.add_parser(
        "export",
        help="copy a model for use elsewhere, to a folder or to the Hugging Face hub",
        description="Write model.safetensors, config.json, a model card filled from the run, and the codec where it was "
        "calibrated and lies beside the run's tokens. from_pretrained reads the folder or the repo.",
    )
    export.add_argument("model", metavar="RUN", help=_MODEL)
    export.add_argument("folder", metavar="FOLDER", nargs="?", help="a new folder")
    export.add_argument(
        "--push-to-hub", metavar="NAME", help="repo on the hub, such as owner/model; made if it is not there"
    )
    export.add_argument("--private", action="store_true", help="make the repo a private one")
    export.set_defaults(run=_export)

    embed = commands.add_parser(
        "embed",
        help="embed every clip of a token folder",
        description="Write the mean over frames of the global encoder for every clip of a token folder: one row a clip.",
    )
    embed.add_argument("model", metavar="RUN", help=_MODEL + ", or the id of a repo on the Hugging Face hub")
    embed.add_argument("tokens", metavar="TOKENS", help="token folder of the model's codec; path or URL")
    embed.add_argument("out", metavar="OUT", help="FILE.npz, or FILE.parquet (needs megascale[parquet]); path or URL")
    embed.add_argument("--batch", type=int, default=16, metavar="N", help="clips per forward pass (default 16)")
    embed.set_defaults(run=_embed)

    for parser in (export, embed):
        parser.add_argument("--endpoint-url", help="S3 endpoint, for stores other than AWS")


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


def _embed(arguments: argparse.Namespace) -> None:
    from megascale.data.index import read_clips, read_manifest
    from megascale.export import embed_clips, load_model

    _configure(arguments, arguments.model, arguments.tokens, arguments.out)
    kind = Path(arguments.out).suffix
    if kind not in (".npz", ".parquet"):
        raise ConfigError(f"{arguments.out}: ends in neither .npz nor .parquet")
    if arguments.batch < 1:
        raise ConfigError(f"--batch {arguments.batch}: must be 1 or more")
    model, manifest = load_model(arguments.model), read_manifest(arguments.tokens)
    needed, theirs, ours = model.global_encoder.num_codebooks, model.codec.fingerprint, manifest.codec.fingerprint
    if theirs != ours:
        raise CheckpointError(
            f"{arguments.model}: trained on tokens of codec {theirs[:8]}; {arguments.tokens} holds codec {ours[:8]}"
        )
    if needed > manifest.codec.num_codebooks:
        stored = f"{arguments.tokens}: stored with {manifest.codec.num_codebooks} codebooks"
        raise DataError(f"{stored}, {arguments.model} needs {needed}")
    clips = list(read_clips(arguments.tokens, manifest, needed))
    embedded_ND = embed_clips(model.global_encoder, clips, arguments.batch)
    columns = {
        "key": [clip.key for clip in clips],
        "recording": [clip.recording for clip in clips],
        "split": [clip.split or "" for clip in clips],
        "labels": [json.dumps(clip.labels, ensure_ascii=False) for clip in clips],
    }
    data = _npz(columns, embedded_ND) if kind == ".npz" else _parquet(columns, embedded_ND)
    storage.publish_bytes(arguments.out, data)
    say(f"{arguments.out}: {len(clips)} clips, {embedded_ND.shape[1]} numbers each")


def _npz(columns: dict[str, list[str]], embedded_ND: np.ndarray) -> bytes:
    file = io.BytesIO()
    arrays: dict[str, Any] = {name: np.array(values, dtype=str) for name, values in columns.items()}
    np.savez(file, embedding=embedded_ND, **arrays)
    return file.getvalue()


def _parquet(columns: dict[str, list[str]], embedded_ND: np.ndarray) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("FILE.parquet needs pyarrow: pip install 'megascale[parquet]'; or choose FILE.npz") from None
    flat = pyarrow.array(embedded_ND.reshape(-1))
    vectors = pyarrow.FixedSizeListArray.from_arrays(flat, embedded_ND.shape[1])
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns | {"embedding": vectors}), file)
    return file.getvalue()
