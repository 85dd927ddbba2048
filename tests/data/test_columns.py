import itertools

import pytest

from l2v.data.columns import guess, numbered, settle
from l2v.data.sources import open_rows
from l2v.recipe import Source

PAIRS = [
    ("anchor", "positive"), ("query", "positive"), ("query", "passage"), ("question", "answer"), ("Question", "Answer"),
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("title", "body"), ("spørgsmål", "svar"),
    ("Spørgsmål", "Svar"), ("SPØRGSMÅL", "SVAR"), ("spoergsmaal", "svar"), ("forespørgsel", "tekst"),
    ("overskrift", "tekst"), ("titel", "beskrivelse"), ("sætning 1", "sætning 2"), ("saetning-1", "saetning-2"),
    ("spo\u0308rgsma\u030al".replace("o\u0308", "ø"), "svar"),
]  # fmt: skip


@pytest.mark.parametrize(("query", "positive"), PAIRS)
@pytest.mark.parametrize("turn", [1, -1])
def test_pairs_are_found_by_their_names_in_any_order(query, positive, turn):
    choice = settle(Source("a.csv"), ["id", *(query, positive)[::turn], "kilde"], "pairs")
    assert (choice.source.query, choice.source.positive) == (query, positive)
    changed = {k: v for k, v in {"query": query, "positive": positive}.items() if k != v}
    assert choice.guessed == changed


@pytest.mark.parametrize(
    "name",
    ["text", "tekst", "Tekst", "sentence", "sætning", "saetning", "content", "indhold", "body", "svar", "passage"],
)
@pytest.mark.parametrize("kind", ["documents", "sentences"])
def test_texts_are_found_by_their_name(name, kind):
    assert settle(Source("a.csv"), ["id", name], kind).source.text == name


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["negatives"], "negatives"),
        (["negative"], "negative"),
        (["Negative"], "Negative"),
        (["negative_1", "negative_2"], "negative_*"),
        (["negative1", "negative2"], "negative*"),
        (["hard_negative_1"], "hard_negative_*"),
        (["negative", "negative_1"], "negative"),
        (["forkert svar"], "forkert svar"),
        (["notes", "negation"], None),
    ],
)
def test_negatives(names, found):
    assert guess("negatives", names) == found
    chosen = settle(Source("a.csv"), ["query", "positive", *names], "pairs").source.negatives
    assert chosen == (found or "negatives")


def test_numbered_columns_stand_in_the_order_of_their_numbers():
    names = ["negative_10", "negative_2", "query", "negative_", "negative_x", "negative_02b"]
    assert numbered("negative_*", names) == ["negative_2", "negative_10"]
    assert numbered("negative", names) == ["negative"]


def test_a_column_that_the_recipe_names_wins():
    names = ["question", "answer", "titel", "tekst", "negative"]
    own = Source("a.csv", query="titel", positive="tekst", negatives="forkert")
    assert settle(own, names, "pairs").source == own and settle(own, names, "pairs").note() is None
    half = settle(Source("a.csv", positive="question"), names, "pairs")
    assert half.guessed == {"query": "titel", "negatives": "negative"}  # the other side never takes the same column
    wrong = settle(Source("a.csv", query="sprgsml"), names, "pairs").source
    assert wrong.query == "sprgsml"


def test_a_default_that_the_file_has_is_never_replaced():
    for names in itertools.permutations(["query", "positive", "negatives", "question", "answer"]):
        assert settle(Source("a.csv"), names, "pairs").guessed == {}


def test_what_has_no_known_name_is_left_alone():
    assert settle(Source("a.csv"), ["a", "b"], "pairs").guessed == {}
    assert settle(Source("a.csv"), ["a", "b"], "documents").source.text == "text"


def test_the_guess_is_one_sentence(tmp_path, write_jsonl):
    rows = [{"Spørgsmål": "Hvad?", "Svar": "Det.", "negative": "Nej."}, {"Spørgsmål": "Hvem?", "Svar": "Hun."}]
    path, notes = write_jsonl(tmp_path / "a.jsonl", rows), []
    read = open_rows([Source(path)], "pairs", notes)
    assert read["query"][:] == ["Hvad?", "Hvem?"] and read["negatives"][:] == [["Nej."], []]
    (note,) = notes
    assert note.startswith(
        f"{path}: columns guessed by their names: query: Spørgsmål, positive: Svar, negatives: negative ("
    )
    notes.clear()
    open_rows([Source(path, query="Spørgsmål", positive="Svar", negatives="negative")], "pairs", notes)
    assert notes == []


def test_columns_of_json_lines_are_those_of_many_rows(tmp_path, write_jsonl):
    rows = [{"query": "a", "positive": "b", "negative": "unread"}, {"query": "a", "positive": "b", "negatives": ["c"]}]
    notes = []
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert open_rows([Source(path)], "pairs", notes)["negatives"][:] == [[], ["c"]]
    assert notes == [f"{path}: columns that are not used: negative"]
