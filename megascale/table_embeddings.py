"""A map of what a pretrained encoder makes of labelled recordings, before it was trained on a label."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megascale import seeding
from megascale.data.index import StoredClip, read_clips, read_manifest
from megascale.downstream.cells import LabelledTokens
from megascale.downstream.protocols import taking_part
from megascale.export import embed_clips, load_model
from megascale.tokens import codebooks_for

_NEIGHBOURS = 30  # t-SNE's perplexity, where there are enough recordings


@dataclass(frozen=True)
class EmbeddingMap:
    """Recordings of one corpus in a plane: points_R2, and the class of each."""

    title: str
    points_R2: np.ndarray
    classes: list[str]


def embedding_maps(
    rows: Sequence[LabelledTokens], checkpoints: dict[float, str], most_recordings: int
) -> list[EmbeddingMap]:
    """Embed recordings of each corpus with the checkpoint of each bitrate (kbps), and lay them out in a plane by t-SNE.

    Args:
        rows: the corpora.
        checkpoints: by bitrate.
        most_recordings: of each corpus, drawn at random; below four there is nothing to lay out.

    Raises:
        CheckpointError, DataError: a checkpoint or a token folder cannot be read.
    """
    from sklearn.manifold import TSNE  # takes a second to import

    device = "cuda" if torch.cuda.is_available() else "cpu"
    maps = []
    for kbps, checkpoint in checkpoints.items():
        encoder = load_model(checkpoint).global_encoder.to(device)
        for row in rows:
            manifest = read_manifest(row.url)
            clips = taking_part(read_clips(row.url, manifest, codebooks_for(kbps)), row.task)
            first_of: dict[str, StoredClip] = {}
            for clip in clips:
                first_of.setdefault(clip.recording, clip)
            first = list(first_of.values())
            rng = seeding.generator(0, "embedding map", row.name)  # a regular step could meet one class alone
            chosen = [first[i] for i in sorted(rng.permutation(len(first))[:most_recordings])]
            if len(chosen) < 4:
                continue
            embedded_RD = embed_clips(encoder, chosen)
            neighbours = min(_NEIGHBOURS, (len(chosen) - 1) / 3)
            points_R2 = TSNE(perplexity=neighbours, init="pca", random_state=0).fit_transform(embedded_RD)
            labels = [clip.labels[row.task.label] for clip in chosen]
            maps.append(EmbeddingMap(f"{row.name}, {kbps:g} kbps", points_R2, [str(label) for label in labels]))
    return maps
