"""A map: texts, embedded and laid out in two dimensions, and a number that says what the map cannot."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from l2v.encoder import Encoder
from l2v.errors import UserError
from l2v.report.own import Texts


@dataclass
class Map:
    """places_N2: float32 [N, 2]. how: the projection method. summary: what holds among all dimensions, as a sentence."""

    texts: Texts
    places_N2: np.ndarray
    how: str
    summary: str


def lay_out(encoder: Encoder, texts: Texts) -> Map:
    """Embed the texts and place them: t-SNE (van der Maaten and Hinton 2008) from a PCA start, or PCA for few texts.

    Raises:
        UserError: if scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("a map needs scikit-learn: pip install 'l2v[eval]'") from None
    vectors_NE = _encoded(encoder, texts)
    if texts.pairs:
        summary = answers_found(vectors_NE, texts.texts)
    elif len(set(texts.labels)) > 1:
        summary = topics_kept(vectors_NE, texts.labels)
    else:
        summary = "The texts have no topics; --map FILE --label COLUMN colours them by one."
    if len(vectors_NE) < 50:
        places, how = PCA(2, random_state=0).fit_transform(vectors_NE), "PCA"
    else:
        # cosine, as in search; a fixed seed, so that the same vectors give the same map
        layout = TSNE(2, metric="cosine", init="pca", perplexity=min(30, len(vectors_NE) // 4), random_state=0)
        places, how = layout.fit_transform(vectors_NE), "t-SNE"
    return Map(texts, places.astype(np.float32), how, summary)


def _encoded(encoder: Encoder, texts: Texts) -> np.ndarray:
    """float32 [N, E]; queries and answers with the instructions of training."""
    show = sys.stderr.isatty()
    if not texts.pairs:
        return encoder.encode(texts.texts, normalize=True, show_progress=show)
    half = len(texts.texts) // 2
    parts = (texts.texts[:half], texts.texts[half:])
    sides = zip(parts, texts.instructions, strict=True)
    return np.concatenate([encoder.encode(part, prompt, normalize=True, show_progress=show) for part, prompt in sides])


def topics_kept(vectors_NE: np.ndarray, labels: list[str]) -> str:
    """The share of texts whose nearest neighbour has their topic, and that of random neighbours."""
    names, topic_N = np.unique(labels, return_inverse=True)
    scores_NN = vectors_NE @ vectors_NE.T
    np.fill_diagonal(scores_NN, -np.inf)
    same = float((topic_N[scores_NN.argmax(axis=1)] == topic_N).mean())
    counts, count = np.bincount(topic_N, minlength=len(names)), len(labels)
    chance = float((counts * (counts - 1)).sum() / (count * (count - 1)))
    return (
        f"{100 * same:.1f}% of the texts have a text of their own topic as nearest neighbour among all "
        f"dimensions (by chance: {100 * chance:.1f}%)."
    )


def answers_found(vectors_NE: np.ndarray, texts: list[str]) -> str:
    """The share of queries whose nearest answer is their own. An equal text of another row counts as their own."""
    half = len(texts) // 2
    answers = np.array(texts[half:], dtype=object)
    nearest_N = (vectors_NE[:half] @ vectors_NE[half:].T).argmax(axis=1)
    found = float(np.mean(answers[nearest_N] == answers))
    chance = float(np.mean([np.mean(answers == answer) for answer in answers]))
    return (
        f"{100 * found:.1f}% of the queries have their own answer as nearest among these {half} answers, by all "
        f"dimensions (by chance: {100 * chance:.1f}%). Lines join a query and its answer."
    )
