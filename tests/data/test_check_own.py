import json

import pytest

from l2v.commands.main import main
from l2v.data.check.own import check_own
from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.recipe import Template

QUESTIONS = (
    "spørgsmål;svar;nr\n"
    "Hvornår har butikken åbent i julen?;Butikken har åbent til klokken tolv juleaften.;1\n"
    "Hvornår har butikken åbent i julen?;Anden juledag er der lukket hele dagen.;2\n"
    "hvornår har butikken åbent i JULEN;Butikken har åbent til klokken tolv juleaften;3\n"
    "Det er det samme på begge sider;Det er det samme på begge sider;4\n"
    "Where is the shop that sells all these things?;The shop is in the main street of the old town.;5\n"
    ";Svar uden spørgsmål;6\n"
    "En linje med for få felter\n"
)


@pytest.fixture(scope="module")
def texts(base):
    return TextTokenizer(load_tokenizer(base), Template(), 24)


def test_every_finding_has_its_file_and_row(tmp_path, texts):
    path = tmp_path / "a.csv"
    path.write_bytes(QUESTIONS.encode("utf-16"))
    lines = check_own(str(path), texts)
    text = "\n".join(lines)
    assert lines[0] == f"{path}: 5 pairs"
    for part in (
        "tokens of query: half have at most",
        f"{path}: columns guessed by their names: query: spørgsmål, positive: svar",
        f"{path}: columns that are not used: nr",
        f"{path}: not valid UTF-8, read as UTF-16",
        f"1 row that cannot be read skipped, the first: {path}, line 8: 1 field where the header has 3 columns",
        f"1 row with an empty text skipped, the first: {path}, line 7",
        f"same twice: 1 (the same text (or pair) as an earlier row)\n    {path}, line 4 and {path}, line 2: hvornår",
        f"several answers: 1 (the question of an earlier row with another answer; they are not negatives of each other)\n"
        f"    {path}, line 3: Hvornår har butikken",
        f"same on both sides: 1 (query and positive are the same text)\n    {path}, line 5: Det er",
        f"other language: 1 (most likely not Danish)\n    {path}, line 6 (en): The shop is",
        "few: 5 pairs; below about 500",
        f"{path}, line 2 (",  # longer than 24 tokens of the tiny base
    ):
        assert part in text, (part, text)


def test_texts_of_two_splits_are_leaks(tmp_path, texts, write_jsonl):
    rows = [{"text": f"Sætning nummer {n} om vejret i Danmark."} for n in range(9)]
    write_jsonl(tmp_path / "corpus-train.jsonl", rows)
    write_jsonl(tmp_path / "corpus-test.jsonl", [*rows[:6], {"text": "En helt anden sætning om noget andet."}])
    text = "\n".join(check_own(str(tmp_path), texts))
    assert "train: 9 texts" in text and "test: 7 texts" in text and text.index("train") < text.index("test: 7")
    assert "leaks: 6 (also in another split, so its score there says little)" in text
    assert text.count("(also in train): Sætning nummer") == 5  # the first five are shown


def test_the_data_of_a_recipe_is_checked_by_stage(tmp_path, base, write_jsonl, capsys):
    pairs = [
        {"query": f"Hvad er {n}?", "positive": f"Det er {n}.", "negatives": [f"Det er {n}.", "Nej."]} for n in range(4)
    ]
    data, held = write_jsonl(tmp_path / "p.jsonl", pairs), write_jsonl(tmp_path / "h.jsonl", pairs[:1])
    stage = {
        "objective": "supervised",
        "data": data,
        "eval_data": held,
        "batch": 2,
        "steps": 1,
        "lr": 1e-4,
        "length": 32,
    }
    recipe = {"name": "r", "base": {"model": str(base)}, "stages": {"s": stage | {"micro_tokens": 64}}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert main(["data", "check", str(tmp_path / "r.yaml")]) == 0
    out = capsys.readouterr().out
    assert "stage s: 4 pairs, 8 hard negatives" in out and "stage s, held out: 1 pair, 2 hard negatives" in out
    assert "negative is an answer: 4" in out and "leaks: 1" in out


def test_a_file_of_which_most_is_lost_needs_a_word(tmp_path, base, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "Hej med dig."}\nnoget andet\nog mere\n')
    assert main(["data", "check", str(path), "--base", str(base)]) == 1
    assert f"{path}: 2 of 3 rows cannot be read; the first: {path}, line 2: malformed JSON" in capsys.readouterr().err
    assert main(["data", "check", str(path), "--base", str(base), "--keep-going"]) == 0
    assert f"{path}: 1 text\n" in capsys.readouterr().out
    path.write_text("intet\n")
    assert main(["data", "check", str(path), "--base", str(base), "--keep-going"]) == 1
    assert main(["data", "check", str(tmp_path / "b.jsonl"), "--base", str(base)]) == 1
    assert "did you mean 'a.jsonl'?" in capsys.readouterr().err
