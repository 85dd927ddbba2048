import collections
import json
from pathlib import Path

from l2v.data.corpus.config import Language
from l2v.data.corpus.language import CODES, Detector

HERE = Path(__file__).parent
SAMPLE = Path(__file__).resolve().parents[2] / "l2v" / "data" / "sample_da"


def labelled() -> list[tuple[str, str]]:
    """(language, text): sentences labelled by hand, and the bitext of the sample."""
    files = [HERE / "languages.jsonl", *sorted(SAMPLE.glob("bitext_*.jsonl"))]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [("no" if code == "nb" else code, text) for row in rows for code, text in row.items()]


def test_danish_is_told_from_its_neighbours_as_often_as_the_module_says():
    detector, kept, count = Detector(Language()), collections.Counter(), collections.Counter()
    for code, text in labelled():
        count[code] += 1
        kept[code] += detector.of(text) == "da"
    assert dict(count) == {"no": 20, "sv": 65, "da": 135, "en": 60}
    assert dict(kept) == {"no": 0, "sv": 0, "da": 131, "en": 0}


def test_a_short_text_is_not_judged():
    assert Detector(Language(short=20)).of("Hej med dig") is None


def test_every_code_is_known_to_the_library():
    assert Detector(Language(keep=["da"], among=list(CODES))).of("Det regner i dag i Aarhus og Odense.") in CODES
