"""Embeddings to one Parquet or NPZ file, on any URL; written when all are known, whole or not at all.

N clips, D width.
"""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megascale import storage
from megascale.errors import ConfigError, StorageError

_ROWS = 8192  # of a Parquet row group


class EmbeddingFile:
    """Collects one row for each clip: `source`, `key` (of a clip in a shard), `frames`, `seconds`, and the embedding.

    The vectors wait in a temporary file, so that memory holds names alone.
    """

    def __init__(self, url: str, width: int, facts: dict[str, str]) -> None:
        """
        Args:
            url: ends in .parquet or .npz; what is there is replaced.
            width: D.
            facts: what made them, for whoever finds the file.

        Raises:
            ConfigError: another ending, or megascale[parquet] is missing.
            StorageError: its place cannot be written.
        """
        if not url.lower().endswith((".parquet", ".npz")):
            raise ConfigError(f"--embeddings={url}: ends in neither .parquet nor .npz")
        self.is_parquet = url.lower().endswith(".parquet")
        if self.is_parquet:
            _arrow()
        storage.check_writable(url)  # the clips may take hours
        self.url, self._width, self._facts = url, width, facts
        self._spool = tempfile.TemporaryFile(prefix="megascale-embeddings-")  # noqa: SIM115  # gone with this object
        self._rows: list[tuple[str, str | None, int, float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, source: str, key: str | None, frames: int, seconds: float, embedding_D: np.ndarray) -> None:
        """Add a clip's row. Raises StorageError: no room for it."""
        self._rows.append((source, key, frames, seconds))
        try:
            self._spool.write(np.ascontiguousarray(embedding_D, dtype=np.float32).tobytes())
        except OSError as failure:
            raise StorageError(f"{tempfile.gettempdir()}: cannot write: {failure.strerror}") from None

    def publish(self) -> None:
        """Write the file. Raises StorageError: its place cannot be written."""
        with tempfile.TemporaryDirectory(prefix="megascale-embeddings-") as folder:
            path = Path(folder, "embeddings")
            try:
                self._spool.flush()
                shape = len(self._rows), self._width
                vectors_ND = np.memmap(self._spool, dtype=np.float32, mode="r", shape=shape)
                (self._write_parquet if self.is_parquet else self._write_npz)(path, vectors_ND)
            except OSError as failure:
                raise StorageError(f"{folder}: cannot write: {failure.strerror or failure}") from None
            storage.upload(path, self.url)

    def _write_npz(self, path: Path, vectors_ND: np.ndarray) -> None:
        source, key, frames, seconds = zip(*self._rows, strict=True)
        facts: dict[str, Any] = {name: np.array(text) for name, text in self._facts.items()}
        with path.open("wb") as file:  # of a path, numpy would make another name
            np.savez(
                file,
                embedding=vectors_ND,
                source=np.array(source),
                key=np.array([name or "" for name in key]),
                frames=np.array(frames, dtype=np.int64),
                seconds=np.array(seconds, dtype=np.float64),
                **facts,
            )

    def _write_parquet(self, path: Path, vectors_ND: np.ndarray) -> None:
        arrow, parquet = _arrow()
        columns = [("source", arrow.string()), ("key", arrow.string()), ("frames", arrow.int64())]
        columns += [("seconds", arrow.float64()), ("embedding", arrow.list_(arrow.float32(), self._width))]
        schema = arrow.schema(columns, metadata=self._facts)
        with parquet.ParquetWriter(path, schema) as writer:
            for first in range(0, len(self._rows), _ROWS):
                names = zip(*self._rows[first : first + _ROWS], strict=True)
                arrays = [arrow.array(values, kind) for values, (_, kind) in zip(names, columns[:-1], strict=True)]
                flat = arrow.array(vectors_ND[first : first + _ROWS].reshape(-1))
                arrays.append(arrow.FixedSizeListArray.from_arrays(flat, self._width))
                writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))


def _arrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError("--embeddings: .parquet needs the extra megascale[parquet]; .npz does not") from None
