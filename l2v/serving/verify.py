"""`l2v verify`: 64 texts through every engine that is installed, compared with l2v's own vectors."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l2v.encoder import Encoder
from l2v.errors import first_line
from l2v.model.settings import quiet_transformers
from l2v.serving.engines import ENGINES, Encode, Engine, Facts
from l2v.serving.remote import Endpoint
from l2v.serving.runtimes import engines_in
from l2v.serving.texts import ASKED, LONGEST, SAMPLE, long_texts

ENTRY = 1e-5
"""fp32: the largest difference in an entry of a vector of length 1."""
COSINE = 1e-3
"""In half precision: the largest 1 - cosine."""
RECALL = 0.99
"""In half precision: the least share of the ten nearest texts that are the same."""
NEAREST = 10
HALF = ("bf16", "fp16", "f16")
"""Everything but these and fp32 is quantised: what it loses is shown, not judged."""

ENDS = {
    "both": "  Mellemrum om teksten. \n",
    "right": "Mellemrum efter teksten. \n",
    "spaces": "Mellemrum efter teksten.  ",
}


@dataclass(frozen=True)
class Row:
    """An engine's vectors against l2v's. same: None if it could not run, or is quantised. note: why it could not, or what it
    makes of an empty text.
    """

    engine: str
    same: bool | None
    entry: float = float("nan")
    cosine: float = float("nan")
    recall: float = float("nan")
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """texts: how many were compared; longest: tokens of the longest one that was given whole; cut: how many were cut."""

    rows: list[Row]
    precision: str
    texts: int
    longest: int
    cut: int

    @property
    def same(self) -> bool:
        """Whether every engine that ran gives l2v's vectors."""
        return all(row.same is not False for row in self.rows)


def verify(
    folder: Path,
    *,
    against: str | None = None,
    engines: Sequence[Engine] | None = None,
    log: Callable[[str], None] = print,
) -> Verification:
    """Compare an export in every engine with l2v.

    against: the run that it was made from, whose vectors are then the expected ones; default: the export in l2v itself.
    engines: default `engines_of(folder)`. log: receives the name of each as it runs.

    Raises:
        UserError: the folder is no export, or the run cannot be loaded.
    """
    facts = Facts.read(folder)
    encoder = Encoder.from_pretrained(against or folder, precision=facts.precision, length=facts.length)
    groups = _groups(encoder, facts)
    tokens = [len(ids) for group in groups for ids in encoder.tokenizer.embedded(group[1], group[0])[0]]
    cut = sum(encoder.tokenizer.embedded(group[1], group[0])[2] for group in groups)
    log(f"l2v: {sum(len(texts) for _, texts in groups)} texts, the longest {max(tokens):,} tokens")
    expected = _vectors(groups, _own(encoder))
    del encoder
    gc.collect()
    rows: list[Row] = []
    if against is not None:
        rows.append(_row("l2v", lambda: _own(Encoder.from_pretrained(folder)), groups, expected, facts, None))
    for engine in engines_of(folder) if engines is None else engines:
        if why := engine.missing():
            rows.append(Row(engine.name, None, note=why))
            continue
        log(engine.name)
        rows.append(
            _row(engine.name, functools.partial(engine.open, folder), groups, expected, facts, engine.precision)
        )
        gc.collect()
    return Verification(rows, facts.precision, len(expected) + 1, max(tokens), cut)


def engines_of(folder: Path, urls: Sequence[str] = (), precision: str = "fp16") -> list[Engine]:
    """Those that read any export, those of its ONNX and GGUF files, and servers of it. precision: of the servers.

    Raises:
        UserError: a URL is none.
    """
    return [*ENGINES, *engines_in(folder), *(Endpoint(url, precision) for url in urls)]


def _groups(encoder: Encoder, facts: Facts) -> list[tuple[str | None, list[str]]]:
    """Texts without and with an instruction: 63, which an empty one follows."""
    plain = SAMPLE + long_texts(lambda text: len(encoder.tokenizer.plain([text])[0]), min(facts.length, LONGEST))
    plain.append(ENDS.get(facts.strips, "Intet mellemrum efter teksten."))
    by_place = facts.pooling in ("weighted_mean", "first") and not facts.include_prompt
    if by_place:  # sentence-transformers has no prompt for them
        return [(None, plain + [f"{text} nu" for text in SAMPLE[: 63 - len(plain)]])]
    known = [text for text in encoder.instructions.query if text]
    return [(None, plain), (known[0] if known else ASKED, SAMPLE[: 63 - len(plain)])]


def _own(encoder: Encoder) -> Encode:
    def encode(texts: list[str], instruction: str | None) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that texts are cut, as they should be
            return encoder.encode(texts, instruction)

    return encode


def _vectors(groups: list[tuple[str | None, list[str]]], encode: Encode) -> np.ndarray:
    return np.concatenate([encode(texts, instruction) for instruction, texts in groups])


def _row(
    name: str,
    start: Callable[[], Encode],
    groups: list[tuple[str | None, list[str]]],
    expected: np.ndarray,
    facts: Facts,
    precision: str | None,
) -> Row:
    try:
        with quiet_transformers():
            encode = start()
            seen = _vectors(groups, encode)
    except Exception as error:  # whatever an engine raises is its result
        return Row(name, False, note=f"fails: {first_line(error)}")
    if seen.shape != expected.shape:
        return Row(name, False, note=f"gives vectors of shape {seen.shape} instead of {expected.shape}")
    seen, wanted = _normalised(seen), _normalised(expected)
    entry = float(np.abs(seen - wanted).max())
    cosine = float((1 - (seen * wanted).sum(1)).max())
    recall = recall_at(wanted, seen)
    same = _judged({facts.precision, precision or facts.precision}, entry, cosine, recall)
    return Row(name, same, entry, cosine, recall, _empty(encode))


def _judged(precisions: set[str], entry: float, cosine: float, recall: float) -> bool | None:
    """Whether vectors are the same, by the limits of the coarser precision. NaN and Inf are not; None if it is quantised."""
    if precisions - {"fp32", *HALF} and np.isfinite([entry, cosine, recall]).all():
        return None
    return bool(entry <= ENTRY if precisions == {"fp32"} else cosine <= COSINE and recall >= RECALL)


def _normalised(vectors_NE: np.ndarray) -> np.ndarray:
    return vectors_NE / np.linalg.norm(vectors_NE, axis=1, keepdims=True)


def recall_at(expected_NE: np.ndarray, seen_NE: np.ndarray, nearest: int = NEAREST) -> float:
    """The share of each text's nearest others (by expected vectors) that are also nearest by the seen ones, on average."""

    def neighbours(vectors_NE: np.ndarray) -> np.ndarray:
        scores_NN = vectors_NE @ vectors_NE.T
        np.fill_diagonal(scores_NN, -np.inf)
        return np.argsort(-scores_NN, axis=1, kind="stable")[:, :nearest]

    pairs = zip(neighbours(expected_NE), neighbours(seen_NE), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / nearest for a, b in pairs]))


def _empty(encode: Encode) -> str:
    """What an engine makes of a text without a character, which l2v refuses."""
    try:
        vector_E = encode([""], None)[0]
    except Exception as error:
        return f"empty text: {first_line(error)}"
    if not np.isfinite(vector_E).all():
        return "empty text: NaN"
    return "empty text: zeros" if not vector_E.any() else "empty text: a vector"
