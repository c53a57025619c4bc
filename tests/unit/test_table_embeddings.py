"""The map of embeddings: recordings that sound alike to the encoder lie together, each under its own class."""

import numpy as np
from support import write_paced_tokens, write_pretrained

from megascale.downstream.cells import LabelledTokens
from megascale.downstream.protocols import TaskConfig
from megascale.table_embeddings import embedding_maps


def test_maps_show_recordings_of_every_corpus_at_every_bitrate(tmp_path):
    write_paced_tokens(tmp_path / "tokens", 40)
    for num_codebooks in (2, 16):
        write_pretrained(tmp_path / f"q{num_codebooks}", num_codebooks)
    row = LabelledTokens("paces", str(tmp_path / "tokens"), TaskConfig(label="class"))
    checkpoints = {1.5: str(tmp_path / "q2"), 12.0: str(tmp_path / "q16")}
    maps = embedding_maps([row], checkpoints, most_recordings=20)
    assert [found.title for found in maps] == ["paces, 1.5 kbps", "paces, 12 kbps"]
    for found in maps:
        assert found.points_R2.shape == (20, 2) and np.isfinite(found.points_R2).all()
        assert len(set(found.classes)) > 1 and len(found.classes) == 20
    again = embedding_maps([row], checkpoints, most_recordings=20)
    assert all(np.array_equal(a.points_R2, b.points_R2) for a, b in zip(maps, again, strict=True))
    assert embedding_maps([row], checkpoints, most_recordings=3) == []
