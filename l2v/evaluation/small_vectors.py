"""Vectors in fewer bytes, and how many of the nearest texts they still find: int8, uint8, bits with rescoring, prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2v.errors import UserError
from l2v.evaluation.intervals import bootstrap_interval

TOP = 10
BLOCK = 1 << 24
"""Numbers that a block of scores holds at most."""


@dataclass(frozen=True)
class Row:
    """One way to keep vectors. size: bytes a document. recall: the mean share of float32's ten nearest documents among its own,
    at full width. low, high: the 95% bootstrap interval of the mean over queries."""

    name: str
    dimensions: int
    size: float
    recall: float
    low: float
    high: float


def unit(x_NE: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """The first dimensions of vectors, scaled to length 1; a vector of zeros stays one."""
    cut = np.asarray(x_NE[:, :dimensions], dtype=np.float32)
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def int8(x_NE: np.ndarray) -> np.ndarray:
    """Whole numbers from -127 to 127 [N, E], by each vector's largest entry: those that `quantize: int8` trains with.

    Cosines of the codes are those of the vectors, nearly; nothing is calibrated.
    """
    largest_N1 = np.abs(x_NE).max(1, keepdims=True).astype(np.float32)
    inverse_N1 = np.divide(np.float32(127), largest_N1, out=np.zeros_like(largest_N1), where=largest_N1 > 0)
    return np.clip(np.floor(x_NE.astype(np.float32) * inverse_N1 + np.float32(0.5)), -127, 127).astype(np.int8)


def ranges(x_NE: np.ndarray) -> np.ndarray:
    """[2, E]: the least and the largest of each dimension, from vectors of the kind that will be kept as uint8."""
    return np.stack([x_NE.min(0), x_NE.max(0)]).astype(np.float32)


def uint8(x_NE: np.ndarray, ranges_2E: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to 255 [N, E], by the range of each dimension, as sentence-transformers' `quantize_embeddings`."""
    low_E, high_E = ranges_2E
    step_E = np.where(high_E > low_E, (high_E - low_E) / 255, 1)
    return np.clip((x_NE - low_E) / step_E, 0, 255).astype(np.uint8)


def from_uint8(codes_NE: np.ndarray, ranges_2E: np.ndarray) -> np.ndarray:
    """The vectors that uint8 codes stand for, float32 [N, E]: the middle of each step."""
    low_E, high_E = ranges_2E
    return (low_E + (codes_NE.astype(np.float32) + 0.5) * (high_E - low_E) / 255).astype(np.float32)


def bits(x_NE: np.ndarray) -> np.ndarray:
    """The signs, eight to a byte: uint8 [N, E / 8], rounded up; 1 where an entry is above 0."""
    return np.packbits(x_NE > 0, axis=1)


def signs(bits_NB: np.ndarray, dimensions: int) -> np.ndarray:
    """1 and -1, float32 [N, E], from `bits`."""
    return np.unpackbits(bits_NB, axis=1, count=dimensions).astype(np.float32) * 2 - 1


def hamming(a_NB: np.ndarray, b_MB: np.ndarray) -> np.ndarray:
    """How many bits differ, int32 [N, M]."""
    out = np.zeros((len(a_NB), len(b_MB)), dtype=np.int32)
    for a_N, b_M in zip(a_NB.T, b_MB.T, strict=True):
        out += np.bitwise_count(a_N[:, None] ^ b_M)
    return out


def nearest(scores_NM: np.ndarray, top: int) -> np.ndarray:
    """Columns of the `top` largest scores of each row, the largest first, ties in order: int64 [N, top]."""
    return np.argsort(-scores_NM, axis=1, kind="stable")[:, :top]


def rescored(
    queries_NE: np.ndarray, bits_NB: np.ndarray, bits_MB: np.ndarray, documents_ME: np.ndarray, top: int, times: int
) -> np.ndarray:
    """`top` documents a query, int64 [N, top]: `top * times` by their bits, then the best of those by their cosine to the query.

    queries_NE: float32. documents_ME: what is read of the candidates, such as `signs` or the codes of int8.
    """
    wide = nearest(-hamming(bits_NB, bits_MB), min(len(bits_MB), top * times))
    scores = np.stack([unit(documents_ME[at]) @ query for at, query in zip(wide, queries_NE, strict=True)])
    return np.take_along_axis(wide, nearest(scores, top), 1)


def compare(
    queries_NE: np.ndarray, documents_ME: np.ndarray, dimensions: Sequence[int] = (), *, times: int = 4
) -> list[Row]:
    """Every format at full width and cut to each of `dimensions`, the largest first.

    times: rescoring reads so many times ten documents.

    Raises:
        UserError: fewer than 20 documents, no query, or a dimension out of range.
    """
    width = documents_ME.shape[1]
    if len(documents_ME) < 2 * TOP or not len(queries_NE):
        raise UserError(
            f"{len(documents_ME)} texts and {len(queries_NE)} queries; recall@{TOP} needs {2 * TOP} texts and a query"
        )
    if bad := [each for each in dimensions if not 1 <= each <= width]:
        raise UserError(f"--dimensions {bad[0]}; give whole numbers from 1 to {width}, the width of the vectors")
    if times < 1:
        raise UserError(f"--rescore is {times}; give a whole number from 1")
    truth = _search(queries_NE, documents_ME, None)
    out = []
    for cut in sorted({width, *dimensions}, reverse=True):
        for name, size, found in _formats(unit(queries_NE, cut), unit(documents_ME, cut), times):
            hits = np.array([len(np.intersect1d(a, b)) / TOP for a, b in zip(truth, found, strict=True)])
            low, high = bootstrap_interval(hits)
            out.append(Row(name, cut, size, float(hits.mean()), low, high))
    return out


def _formats(q_NE: np.ndarray, d_ME: np.ndarray, times: int) -> Iterator[tuple[str, float, np.ndarray]]:
    """(name, bytes a document, the nearest documents of each query) of every format of these unit vectors."""
    width = d_ME.shape[1]
    yield "float32", 4.0 * width, _search(q_NE, d_ME, None)
    yield "float16", 2.0 * width, _search(q_NE, d_ME.astype(np.float16).astype(np.float32), None)
    yield "int8", float(width), _search(int8(q_NE), int8(d_ME), None)
    # The ranges are of the documents and count once.
    found = ranges(d_ME)
    yield "uint8", width + 8 * width / len(d_ME), _search(q_NE, from_uint8(uint8(d_ME, found), found), None)
    packed_q, packed_d = bits(q_NE), bits(d_ME)
    size = float(packed_d.shape[1])
    rows = max(1, BLOCK // len(d_ME))
    blocks = [slice(at, at + rows) for at in range(0, len(q_NE), rows)]
    yield "binary", size, np.concatenate([nearest(-hamming(packed_q[at], packed_d), TOP) for at in blocks])
    for name, more, kept in (("signs", 0.0, signs(packed_d, width)), ("int8", float(width), int8(d_ME))):
        best = [rescored(q_NE[at], packed_q[at], packed_d, kept, TOP, times) for at in blocks]
        yield f"binary, rescored by {name}", size + more, np.concatenate(best)


def _search(q_NE: np.ndarray, d_ME: np.ndarray, dimensions: int | None) -> np.ndarray:
    q_NE, d_ME = unit(q_NE, dimensions), unit(d_ME, dimensions)
    rows = max(1, BLOCK // len(d_ME))
    return np.concatenate([nearest(q_NE[at : at + rows] @ d_ME.T, TOP) for at in range(0, len(q_NE), rows)])


def as_text(rows: Sequence[Row], count: tuple[int, int]) -> str:
    """A Markdown table. count: queries and documents."""
    lines = [
        f"recall@{TOP} against float32 at full width: {count[0]:,} queries, {count[1]:,} texts. Interval: 95% bootstrap over "
        "queries.\n",
        f"| format | dimensions | bytes a vector | of float32 | recall@{TOP} | 95% interval |",
        "|-|-:|-:|-:|-:|-:|",
    ]
    for row in rows:
        share = row.size / rows[0].size
        lines.append(
            f"| {row.name} | {row.dimensions} | {row.size:,.0f} | {share:.1%} | {row.recall:.3f} | "
            f"{row.low:.3f} to {row.high:.3f} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Row], title: str, out: Path) -> None:
    """Recall over bytes a vector, a line for each format and a point for each length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(row.name for row in rows):
        of: list[Any] = [row for row in rows if row.name == name]
        spread = np.array([[row.recall - row.low for row in of], [row.high - row.recall for row in of]])
        axis.errorbar(
            [row.size for row in of], [row.recall for row in of], yerr=np.maximum(spread, 0), marker="o", markersize=4,
            linewidth=1.4, elinewidth=0.8, label=name,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set(title=title, xlabel="bytes a vector", ylabel=f"recall@{TOP} against float32", ylim=(0, 1.02))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)
