"""Files of embeddings: every row, however many there are."""

import numpy as np
import pyarrow.parquet
import pytest

from megascale.downstream.embeddings import EmbeddingFile


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_rows_of_every_row_group_are_their_own(tmp_path, ending):
    url, count = str(tmp_path / f"out.{ending}"), 20_000
    vectors_ND = np.random.default_rng(0).standard_normal((count, 2)).astype(np.float32)
    file = EmbeddingFile(url, 2, {"model": "run"})
    for i, embedding_D in enumerate(vectors_ND):
        file.add(f"{i}.ecdc", f"key-{i}" if i % 2 else None, i, i / 75, embedding_D)
    file.publish()
    if ending == "parquet":
        assert pyarrow.parquet.ParquetFile(url).num_row_groups == 3
        table = pyarrow.parquet.read_table(url)
        columns = {name: table[name].to_pylist() for name in table.column_names}
        read_ND = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 2)
    else:
        columns = {name: values.tolist() for name, values in np.load(url).items()}
        read_ND = np.load(url)["embedding"]
    assert np.array_equal(read_ND, vectors_ND)
    assert columns["source"] == [f"{i}.ecdc" for i in range(count)]
    assert columns["key"] == [f"key-{i}" if i % 2 else (None if ending == "parquet" else "") for i in range(count)]
    assert columns["frames"] == list(range(count))
    assert columns["seconds"] == [i / 75 for i in range(count)]
