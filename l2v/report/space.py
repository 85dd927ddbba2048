"""A map: texts with topics, embedded and laid out in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l2v.data import sample
from l2v.encoder import Encoder
from l2v.errors import UserError

MAX_TEXTS = 2000  # more dots would overlap in a picture


@dataclass
class Map:
    """places_N2: float32 [N, 2]; labels: N topics; same: share of texts whose nearest neighbour has their topic, 0 to 1.

    chance: the expected `same` of random neighbours. how: the projection method.
    """

    places_N2: np.ndarray
    labels: list[str]
    same: float
    chance: float
    how: str
    source: str

    def summary(self) -> str:
        """The numbers as a sentence."""
        return (
            f"{100 * self.same:.1f}% of the texts have a text of their own topic as nearest neighbour among all "
            f"dimensions (by chance: {100 * self.chance:.1f}%)."
        )


def labelled(file: str | None, text: str, label: str | None) -> tuple[list[str], list[str], str]:
    """Texts, their topics, and their origin: the passages of the Danish sample, or a file with a column of labels.

    Raises:
        UserError: if the file has no such column, or fewer than two topics.
    """
    if file is None:
        passages = list(sample.passages().values())
        return (
            [p.text for p in passages],
            [p.subject for p in passages],
            "the passages of the Danish sample, by subject",
        )
    assert label is not None  # the command line requires it with a file
    from l2v.evaluation.rows import read_rows

    found = read_rows(Path(file), [text], [label])
    rows = found.rows
    if len(rows) > MAX_TEXTS:
        rows = [rows[i] for i in np.random.default_rng(0).choice(len(rows), MAX_TEXTS, replace=False)]
    labels = [str(row[label]) for row in rows]
    if len(set(labels)) < 2 or len(rows) < 4:
        raise UserError(
            f"{file}: {len(rows)} rows of {len(set(labels))} topics in '{label}'; a map needs 4 rows and 2 topics"
        )
    return [row[text] for row in rows], labels, f"{Path(file).name}, by {label}"


def lay_out(encoder: Encoder, texts: list[str], labels: list[str], source: str) -> Map:
    """Embed the texts and place them: t-SNE (van der Maaten and Hinton 2008) from a PCA start, or PCA for few texts.

    Raises:
        UserError: if scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("a map needs scikit-learn: pip install 'l2v[eval]'") from None
    vectors_NE = encoder.encode(texts, show_progress=True)
    names, topic_N = np.unique(labels, return_inverse=True)
    scores_NN = vectors_NE @ vectors_NE.T
    np.fill_diagonal(scores_NN, -np.inf)
    same = float((topic_N[scores_NN.argmax(axis=1)] == topic_N).mean())
    counts = np.bincount(topic_N, minlength=len(names))
    chance = float((counts * (counts - 1)).sum() / (len(texts) * (len(texts) - 1)))
    if len(texts) < 50:
        places, how = PCA(2, random_state=0).fit_transform(vectors_NE), "PCA"
    else:
        # cosine, as in search; a fixed seed, so that the same vectors give the same map
        layout = TSNE(2, metric="cosine", init="pca", perplexity=min(30, len(texts) // 4), random_state=0)
        places, how = layout.fit_transform(vectors_NE), "t-SNE"
    return Map(places.astype(np.float32), labels, same, chance, how, source)
