"""`l2v init`: a recipe for one's own data."""

import csv
import shlex

import datasets
import pytest

from l2v.commands import main as cli
from l2v.recipe.load import load_recipe

PLACES = ("Ærø", "Fanø", "Læsø", "Rømø", "Samsø", "Møn", "Anholt", "Tunø")
BASE = "smollm2-135m-instruct"


@pytest.fixture
def init(tmp_path, monkeypatch, capfd):
    """init(*arguments, expect=0) -> (recipe or None, what was printed), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, expect=0):
        assert cli.main(["init", *map(str, arguments)]) == expect
        shown = capfd.readouterr()
        if expect:
            assert shown.err.startswith("l2v: ") and shown.err.count("\n") == 1, shown.err
            return None, shown.err
        assert not shown.err
        return load_recipe(f"{arguments[0]}.yaml"), shown.out

    return run


def faq(path, count=40, header=("Spørgsmål", "Svar"), delimiter=";", encoding="utf-8-sig", more=()):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["Nr", *header])
        for i in range(count):
            place = f"{PLACES[i % 8]} {i}"
            writer.writerow(
                [i, f"Hvordan kommer man til {place}?", f'Man sejler til {place}.\nTag en taske; og "mad", med.']
            )
        writer.writerows(more)
    return path


def test_a_semicolon_csv_with_danish_headings(init, tmp_path):
    recipe, shown = init("faq", "--data", faq(tmp_path / "faq.csv", 100, more=[["x", "Hvad?", " "]]).name)
    assert "faq.csv: 100 pairs, 1 more with an empty text (skipped), delimiter semicolon" in shown
    assert "columns Nr, Spørgsmål, Svar; read as query: Spørgsmål, positive: Svar" in shown
    train, search = (shlex.split(line) for line in shown.splitlines() if line.startswith("  l2v "))
    assert train == ["l2v", "train", "faq.yaml"]
    assert search == ["l2v", "search", "runs/faq", "Hvordan kommer man til Ærø 0?", "--texts", "faq.csv"]
    assert (recipe.name, recipe.base.model, recipe.base.template.suffix) == ("faq", BASE, "<|im_end|>")
    assert recipe.order() == ["mntp", "supervised"]
    (source,) = recipe.stages["supervised"].data
    assert (source.path, source.query, source.positive, source.skip_empty) == ("faq.csv", "Spørgsmål", "Svar", True)
    assert recipe.stages["mntp"].data[0].text == "Svar" and recipe.stages["supervised"].max_negatives == "auto"
    # A few minutes on two cores: the quickstart, which takes less than ten, meets 160,000 tokens.
    tokens = sum(stage.steps * stage.batch * stage.length for stage in recipe.stages.values())
    assert tokens <= 120_000


def test_every_value_is_explained_in_its_line(init, tmp_path):
    faq(tmp_path / "faq.csv")
    init("faq", "--data", "faq.csv")  # a relative path: the width of its line is not the test folder's
    text = (tmp_path / "faq.yaml").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 130 and "None" not in text
    for key in (
        "batch",
        "length",
        "micro_tokens",
        "steps",
        "lr",
        "warmup",
        "decay",
        "decay_steps",
        "save_every",
        "scale",
        "precision",
    ):
        assert all("#" in line for line in text.splitlines() if line.strip().startswith(f"{key}:")), key


ROWS = [{"query": f"Hvor er {p}?", "passage": f"{p} er en ø.", "negative_1": "Nej.", "negative_2": ""} for p in PLACES]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_pairs_of_every_kind_of_file(init, tmp_path, write_jsonl, kind):
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    recipe, shown = init("mine", "--data", path)
    assert f"{path}: 8 pairs" in shown and ("delimiter" in shown) == (kind in ("csv", "tsv"))
    (source,) = recipe.stages["supervised"].data
    assert (source.query, source.positive, source.negatives) == ("query", "passage", "negative_*")
    assert recipe.stages["supervised"].max_negatives == "auto"
    assert "at most 7; yours have up to 1\n" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt", "parquet"])
def test_texts_become_mntp_and_simcse(init, tmp_path, write_jsonl, kind):
    texts = [f"Færgen til {place} sejler hver dag klokken {hour}." for place in PLACES for hour in (8, 9, 10)]
    path, column = tmp_path / f"my texts.{kind}", "text" if kind == "txt" else "Indhold"
    if kind == "jsonl":
        write_jsonl(path, [{"Indhold": text} for text in texts])
    elif kind == "parquet":
        datasets.Dataset.from_dict({"Indhold": texts}).to_parquet(str(path))
    else:
        path.write_text("\n".join(["Indhold"] * (kind == "csv") + texts), encoding="utf-8")
    recipe, shown = init("texts", "--data", path)
    assert recipe.order() == ["mntp", "simcse"] and f"{path}: 24 texts" in shown
    for stage in recipe.stages.values():
        assert (stage.data[0].path, stage.data[0].text, stage.data[0].sentences) == (str(path), column, False)
    assert recipe.stages["simcse"].batch == 4 and f"--texts {shlex.quote(str(path))}" in shown


def test_long_texts_are_split_into_sentences(init, tmp_path, write_jsonl):
    text = " ".join(f"Færgen til {place} sejler hver eneste dag om sommeren." for place in PLACES)
    recipe, _ = init("long", "--data", write_jsonl(tmp_path / "long.jsonl", [{"tekst": text}] * 30))
    assert recipe.stages["simcse"].data[0].sentences and not recipe.stages["mntp"].data[0].sentences
    assert recipe.stages["simcse"].batch == 32  # of 240 sentences


def test_sizes_follow_the_number_of_rows(init, tmp_path, write_jsonl):
    sizes = {}
    for count in (2, 100, 3000, 60_000):
        rows = [{"question": f"Hvad er {i}?", "answer": f"Det er {i}, som kommer efter {i - 1}."} for i in range(count)]
        path = write_jsonl(tmp_path / f"{count}.jsonl", rows)
        for base in (BASE, "some/llama"):
            recipe, _ = init(f"n{count}-{base[:3]}", "--data", path, "--base", base)
            sizes[count, base] = (recipe.stages["supervised"].batch, recipe.stages["supervised"].steps)
    assert sizes == {
        (2, BASE): (2, 30), (100, BASE): (16, 30), (3000, BASE): (32, 282), (60_000, BASE): (32, 1000),
        (2, "some/llama"): (2, 30), (100, "some/llama"): (16, 30), (3000, "some/llama"): (128, 71),
        (60_000, "some/llama"): (128, 1000),
    }  # fmt: skip


def test_a_base_of_a_shipped_recipe_brings_its_template_and_rates(init, tmp_path):
    path = faq(tmp_path / "faq.csv")
    shipped = load_recipe("llama3-8b-da")
    recipe, _ = init("big", "--data", path, "--base", shipped.base.model)
    assert recipe.base.template == shipped.base.template
    assert [recipe.stages[n].lr for n in ("mntp", "supervised")] == [
        shipped.stages[n].lr for n in ("mntp", "supervised")
    ]
    other, _ = init("other", "--data", path, "--base", "some/llama")
    assert other.base.template.prefix == "" and other.base.model == "some/llama"


@pytest.mark.parametrize("name", ["a, b.csv", 'kø\'er & "æbler".csv', "no.csv", "{x}.csv", "a: b #1.csv"])
@pytest.mark.parametrize("header", [("Question", "Answer"), ("query", "positive")])
def test_odd_names_are_quoted_in_recipe_and_command(init, tmp_path, name, header):
    recipe, shown = init("odd", "--data", faq(tmp_path / name, header=header).name)
    assert [recipe.stages[s].data[0].path for s in ("mntp", "supervised")] == [name, name]
    assert shlex.split(shown.splitlines()[-1])[-1] == name


def test_the_search_command_names_a_column_that_would_not_be_guessed(init, tmp_path):
    _, shown = init("faq", "--data", faq(tmp_path / "faq.csv", header=("Titel", "Svar")))
    assert "--column" not in shown
    rows = "spørgsmål;svar;tekst\n" + "a;b;c\n" * 4
    (tmp_path / "b.csv").write_text(rows, encoding="utf-8")
    _, shown = init("b", "--data", "b.csv")
    assert shown.rstrip().endswith("--texts b.csv --column svar")


@pytest.mark.parametrize("out", [None, "elsewhere.yaml"])
def test_a_recipe_is_never_overwritten(init, tmp_path, out):
    path = faq(tmp_path / "faq.csv")
    own = tmp_path / (out or "faq.yaml")
    own.write_text("mine")
    _, message = init("faq", "--data", path, *(["--out", out] if out else []), expect=1)
    assert "exists and was not changed; choose another name, or another file with --out" in message
    assert own.read_text() == "mine" and len(list(tmp_path.glob("*.yaml"))) == 1


def test_out_may_be_elsewhere(init, tmp_path):
    (tmp_path / "recipes").mkdir()
    out = "recipes/mine.yaml"
    assert cli.main(["init", "faq", "--data", str(faq(tmp_path / "faq.csv")), "--out", out]) == 0
    assert load_recipe(out).name == "faq"
    _, message = init("faq", "--data", tmp_path / "faq.csv", "--out", "not/there.yaml", expect=1)
    assert "not/there.yaml: cannot be written: No such file" in message
    _, message = init("faq", "--data", tmp_path / "faq.csv", "--out", "faq.yml", expect=1)
    assert "a recipe's name ends in .yaml" in message


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        (
            "a.csv",
            "Kolonne A;Kolonne B\n1;2\n",
            ["found Kolonne A, Kolonne B", "first line", "spørgsmål", "svar", "tekst"],
        ),
        ("a.csv", "spørgsmål;nr\nHvad?;1\n", ["found spørgsmål, nr", "looked for a pair (query, anchor, question"]),
        ("a.jsonl", '{"q": "a", "a": "b"}\n', ["found q, a and looked for"]),
        ("a.csv", "spørgsmål;svar\nHvad?;Det\n", ["1 row with text; training needs at least 2"]),
        ("a.csv", "spørgsmål;svar\nHvad?;\nHvem?;\n", ["0 rows with text"]),
        ("a.csv", "spørgsmål;svar\n", ["0 rows with text"]),
        ("a.csv", "", ["the file is empty"]),
        ("a.jsonl", "", ["the file is empty"]),
        ("a.csv", "spørgsmål;svar\nHvad?;Det;er\n", ["a.csv, line 2: 3 fields where the header has 2 columns"]),
        ("a.csv", 'spørgsmål;svar\nHvad?;"Det\n', ["a.csv, line 2: a quote is opened here and never closed"]),
        ("a.jsonl", '{"query": "a", "positive": 3}\n', ["line 1: the field 'positive' is text; found int"]),
        ("a.docx", "x", ["unknown file type '.docx'; save it as .txt"]),
        ("b.csv", None, ["file not found; give a file, a folder"]),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence_and_no_recipe(init, tmp_path, name, content, parts):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    _, message = init("mine", "--data", name, expect=1)
    for part in (name, *parts):
        assert part in message, message
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "", "æ"])
def test_a_name_that_is_no_folder(init, tmp_path, name):
    assert "use letters, digits, - and _" in init(name, "--data", faq(tmp_path / "faq.csv"), expect=1)[1]


def test_from_a_table_to_a_searched_encoder(init, base, run_here, capfd, tmp_path):
    """The commands that it prints, on a tiny base: they read the same rows and columns."""
    path = faq(tmp_path / "faq.csv", 24)
    _, shown = init("faq", "--data", path.name, "--base", base)
    commands = [shlex.split(line)[1:] for line in shown.splitlines() if line.startswith("  l2v ")]
    train, search = commands
    quick = [
        "mntp.steps=2",
        "supervised.steps=2",
        "mntp.length=64",
        "base.precision=fp32",
        "tracking.tensorboard=false",
    ]
    out = run_here(*train[1:], *quick)
    assert (
        "mntp: 24 documents" in out and "supervised: 24 pairs" in out and "done, adapter in runs/faq/supervised" in out
    )
    capfd.readouterr()
    assert cli.main([*search, "--top", "2"]) == 0
    found = capfd.readouterr()
    assert found.err.startswith("faq.csv: columns guessed by their names: text: Svar (a column that you name wins)\n")
    # A text that spans lines is one result.
    assert found.out.count('Tag en taske; og "mad", med.') == 2 and found.out.count("Man sejler til") == 2


def test_a_folder_of_unlike_files_and_a_file_without_a_header(init, tmp_path):
    folder = tmp_path / "filer"
    folder.mkdir()
    faq(folder / "a.csv", 10)
    faq(folder / "b.csv", 10, header=("query", "positive"))
    (folder / "tom.csv").touch()
    _, shown = init("alt", "--data", "filer")
    assert "filer: 20 pairs" in shown and "each of the 3 files is read by its own columns" in shown
    assert "filer: 1 file that cannot be read skipped, the first: filer/tom.csv: the file is empty" in shown
    (search,) = (line for line in shown.splitlines() if "l2v search" in line)
    assert "--column" not in search
    (tmp_path / "uden.csv").write_text("Hvornår åbner I?;Klokken ti.\nHvad koster det?;Fem kroner.\n", encoding="utf-8")
    says = "uden.csv: the first line looks like data, not like names of columns; put a line above it"
    assert says in init("x", "--data", "uden.csv", expect=1)[1]
